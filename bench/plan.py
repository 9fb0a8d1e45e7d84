"""A plan beside a start on the GPU at hand: python bench/plan.py [model] [settings as JSON].

The model is a folder, or the name of a shape; by default every shape that fits. Weights are random
by default, so that a config.json is enough. One line of JSON per model: what was
planned and what the engine has, in blocks and GiB, and how far the plan is off in percent.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from model_shapes import SHAPES

from pagedcore.config import EngineConfig
from pagedcore.engine.build import build_engine
from pagedcore.execution import memory
from pagedcore.execution.plan import Gpu
from pagedcore.execution.planning import plan_engine
from pagedcore.plugins import load_plugins


def compare(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Plan, start, and put the two beside each other."""
    config = EngineConfig.from_options(model=str(folder), **{"load_format": "dummy", **options})
    plugins = load_plugins()
    facts = torch.cuda.get_device_properties(0)
    gpu = Gpu(total_bytes=facts.total_memory, is_a100="A100" in facts.name)
    plan, _ = plan_engine(config, folder, plugins, gpu=gpu)
    if not plan.fits:
        return {"model": plan.architecture, "gpu": facts.name, "problem": plan.problem}
    engine = build_engine(config, usage="serve", plugins=plugins, folder=folder)
    num_blocks = engine.info.num_blocks
    held = torch.cuda.memory_allocated()
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    planned = plan.weight_bytes + plan.cache_bytes + plan.row_bytes
    return {
        "model": plan.architecture,
        "gpu": facts.name,
        "planned_blocks": plan.num_blocks,
        "blocks": num_blocks,
        "blocks_off_percent": round(100 * (plan.num_blocks / num_blocks - 1), 2),
        "planned_gib": round(planned / memory.GIB, 3),
        "gib": round(held / memory.GIB, 3),
        "off_percent": round(100 * (planned / held - 1), 2),
        "planned_step_gib": round(plan.step_bytes / memory.GIB, 3),
    }


def main() -> None:
    """One model that is named, or every shape of `model_shapes`."""
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    named = sys.argv[1:2]
    if named and named[0] not in SHAPES:
        print(json.dumps(compare(Path(sys.argv[1]), options)))
        return
    for name in named or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(SHAPES[name]))
            print(json.dumps(compare(Path(folder), options)), flush=True)


if __name__ == "__main__":
    main()
