"""A stand-in for a model: each running sequence gets one token per step of a fixed duration.

    PACED_STEP_S=0.005 python bench/paced_engine.py pagedcore_openai.serve:serve \
        '{"engine": {"model": "folder"}, "server": {"port": 8000}}'

Serves it through any mount. It costs little, so that what is measured is the mount. In its model
folder it writes its process id to `pid`, and a line to `aborts` for each sequence that is aborted:
the time, by the clock that all processes of a machine share, and how many tokens it had.
"""

import importlib
import json
import logging
import os
import sys
import time
from pathlib import Path

from pagedcore.config import EngineConfig
from pagedcore.errors import PagedcoreError
from pagedcore.server_config import ServerConfig
from pagedcore.testing.fake_engine import build_fake_engine

BUILD = "paced_engine:build_paced"


def build_paced(config, *, usage):
    """For `EngineProcess(config, build=BUILD)`, with this folder on PYTHONPATH."""
    engine = build_fake_engine(config, usage=usage)
    folder = Path(config.model.model)
    (folder / "pid").write_text(str(os.getpid()))
    aborts = open(folder / "aborts", "a", buffering=1)  # noqa: SIM115  # open as long as it runs
    step_s = float(os.environ["PACED_STEP_S"])
    step, abort = engine.step, engine.abort
    due = 0.0

    def paced_step():
        nonlocal due
        now = time.monotonic()
        due = max(due + step_s, now)  # a late step is not made up for
        time.sleep(due - now)
        return step()

    def noted_abort(request_ids):
        ids = set(request_ids)
        live = {i: s for i, s in {**engine._running, **engine._waiting}.items() if i in ids}
        abort(ids)
        for sequence in live.values():
            aborts.write(f"{time.monotonic()} {len(sequence.produced)}\n")

    engine.step, engine.abort = paced_step, noted_abort
    return engine


def main(mount, options):
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    given = json.loads(options)
    module, _, function = mount.partition(":")
    serve = getattr(importlib.import_module(module), function)
    try:
        return serve(
            EngineConfig.from_options(**given["engine"]),
            ServerConfig(**given["server"]),
            build=BUILD,
        )
    except PagedcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
