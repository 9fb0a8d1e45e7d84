"""Start an engine as stdin says, tell on stdout how long each phase took, and end.

What `pagedcore bench startup` runs in a process of its own. One line comes when the engine is
ready, and one when its CUDA graphs are captured, which a server does while it answers already.
"""

import json
import sys
import time
from typing import Any

from pagedcore.errors import PagedcoreError


def main() -> int:
    """The exit status: 1 when the engine cannot start, with the reason on stderr."""
    options: dict[str, Any] = json.load(sys.stdin)
    from pagedcore import LLM

    imported = time.perf_counter()
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        with LLM(**values) as llm:
            ready = time.perf_counter()
            phases = {k: v for k, v in llm.engine.info.startup_seconds.items() if k != "total"}
            # the engine counts from when it is made; plugins, model files and text come before
            others = sum(seconds for name, seconds in phases.items() if name != "config")
            print(json.dumps({**phases, "config": ready - imported - others}), flush=True)
            while llm.engine.prepare():
                pass
            print(json.dumps({"graphs": time.perf_counter() - ready}), flush=True)
    except PagedcoreError as error:
        print("pagedcore:", error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
