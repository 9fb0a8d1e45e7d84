"""Serve a steered engine, which needs no model, through any mount: for tests of what is in front.

    python -m pagedcore.testing.serve_steered pagedcore_openai.serve:serve \\
        '{"engine": {"model": "folder"}, "server": {"port": 8000}}'

A mount is called with both configurations and `build=`, and returns the exit status. The key
"build" may name another engine, as module:function.
"""

import importlib
import json
import sys
from typing import Any

from pagedcore.config import EngineConfig
from pagedcore.errors import PagedcoreError
from pagedcore.logs import configure_logs
from pagedcore.server_config import ServerConfig
from pagedcore.testing.steered_engine import BUILD_STEERED


def main(mount: str, options: str) -> int:
    """Serve until told to stop."""
    given = json.loads(options)
    configure_logs(given["server"].get("log_format", "text"))
    module, _, function = mount.partition(":")
    serve = getattr(importlib.import_module(module), function)
    try:
        server: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given["server"].items()
        }
        status: int = serve(
            EngineConfig.from_options(**given["engine"]),
            ServerConfig(**server),
            build=given.get("build", BUILD_STEERED),
        )
    except PagedcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
