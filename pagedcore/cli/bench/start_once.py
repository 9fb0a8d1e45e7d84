"""Start an engine as stdin says, tell on stdout how long each phase took, and end.

What `pagedcore bench startup` runs in a process of its own.
"""

import json
import sys
from typing import Any

from pagedcore.errors import PagedcoreError


def main() -> int:
    """The exit status: 1 when the engine cannot start, with the reason on stderr."""
    options: dict[str, Any] = json.load(sys.stdin)
    from pagedcore import LLM

    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        with LLM(**values) as llm:
            print(json.dumps(llm.engine.info.startup_seconds), flush=True)
    except PagedcoreError as error:
        print("pagedcore:", error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
