"""The workspace without an installation: its folders on the path, its plugins registered by hand.

For machines that hold torch and triton and where nothing can be installed. Import this first.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDERS = [str(ROOT / name) for name in (".", "bench", "kernels", "plugins/models")]
FOLDERS.append(str(ROOT / "plugins/quantization"))
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])

import pluggy
from model_shapes import write

from pagedcore.config import EngineConfig


def plugins() -> pluggy.PluginManager:
    """The workspace's own plugins, without entry points."""
    import pagedcore.builtin
    import pagedcore_kernels
    import pagedcore_models
    import pagedcore_quantization
    from pagedcore.plugins import register

    modules = {
        "core": pagedcore.builtin,
        "kernels": pagedcore_kernels,
        "models": pagedcore_models,
        "quantization": pagedcore_quantization,
    }
    return register(modules)


def shape_options(shape: str, **options: Any) -> dict[str, Any]:
    """Settings of an engine with random weights of a shape; `-fp8` at its end quantizes them."""
    folder = tempfile.mkdtemp()
    write(folder)
    options = (
        dict(model=str(Path(folder, shape.removesuffix("-fp8"))), load_format="dummy") | options
    )
    if shape.endswith("-fp8"):
        options["quantization"] = "fp8"
    return options


def build(config: EngineConfig, **how: Any) -> Any:
    """An engine with these plugins; also for a child process, as `workspace:build`."""
    from pagedcore.engine.build import build_engine

    return build_engine(config, plugins=plugins(), **how)
