"""Lets `stub_model.py` run in Triton, in front of PyTriton's own model and without editing it.

It relies on names that PyTriton 0.7.0 does not promise. Without one of them the model is served
as PyTriton would serve it: cancellation reaches nobody, and Triton's metrics have none of ours.
"""

import importlib.util
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAMES = (
    "class DecoupledResponsesHandler",
    "def _wrap_response(",
    "def _wrap_request(",
    "self._requests_server = TritonRequestsServer(",
)
"""What must stand in the model file that PyTriton sends to Triton."""


def bind(triton: Any, name: str, **options: Any) -> bool:
    """`triton.bind`, with our stub; False, after a warning, where it had to go without."""
    from pytriton.models.model import Model

    missing = missing_names()
    if missing:
        logger.warning(
            "this PyTriton has no %s: clients that leave are not noticed, and Triton's metrics "
            "have none of ours",
            " and no ".join(missing),
        )
        triton.bind(model_name=name, **options)
        return False
    original = Model.get_proxy_model_files
    stub = _source("pagedcore_pytriton.stub_model")
    stub = stub.replace(b"MOUNT_PID = 0", b"MOUNT_PID = %d" % os.getpid())

    def files(model: Any) -> dict[str, bytes]:
        shipped: dict[str, bytes] = original(model)
        if model.model_name == name:
            folder = f"file:{model.model_version}"
            shipped[f"{folder}/pytriton_model.py"] = shipped[f"{folder}/model.py"]
            shipped[f"{folder}/model.py"] = stub
        return shipped

    Model.get_proxy_model_files = files  # asked now, where tritonserver runs already
    try:
        triton.bind(model_name=name, **options)
    finally:
        Model.get_proxy_model_files = original
    for model in triton._model_manager.models:  # asked later, where it does not
        if model.model_name == name:
            model.get_proxy_model_files = partial(files, model)
    return True


def missing_names() -> list[str]:
    """What the shim needs of PyTriton, and is not there."""
    from pytriton.models.model import Model

    text = _source("pytriton.proxy.model").decode()
    missing = [name for name in NAMES if name not in text]
    if not hasattr(Model, "get_proxy_model_files"):
        missing.append("Model.get_proxy_model_files")
    return missing


def _source(module: str) -> bytes:
    """A module's file, without importing it: both can be imported in Triton only."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_bytes()
