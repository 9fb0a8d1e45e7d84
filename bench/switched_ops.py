"""One set of weights under two backends: an engine whose model can be run by plain torch, too.

The kernels and plain torch read matrices of a GPU in the same layout, so that a model which holds
on to `SwitchedOps` computes with either; and, with `widened`, in float32.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import workspace
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pagedcore import EngineConfig, hookimpl
from pagedcore.engine.engine import Engine
from pagedcore.execution.model import Model, ModelBuild
from pagedcore.execution.ops import Ops
from pagedcore.execution.random_weights import DEVIATION, RandomWeights
from pagedcore.execution.torch_ops import TorchOps

STRESSED = {"q_proj": 4.0, "q_norm": 2.0, "o_proj": 4.0}
"""How much more random matrices count: else all positions would look alike to attention, and a
mistake there would be lost in what the other layers add."""

GAIN = 0.64
"""Of a random matrix: how much larger its products are than their inputs. With the deviation that
is usual, wide layers have gains above 1, and errors of rounding grow until no logit is the same."""


class SwitchedOps:
    """`Ops` that are those of the backend `triton`, but within `plain` those of `torch`."""

    def __init__(self, device: str) -> None:
        from pagedcore_kernels.backend import TritonOps

        self.triton = TritonOps(device)
        self.torch = TorchOps(device)
        self._current: Ops = self.triton

    def __getattr__(self, name: str) -> Any:
        return getattr(self._current, name)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Let operations be those of plain torch."""
        self._current = self.torch
        try:
            yield
        finally:
            self._current = self.triton


class Widened(TorchFunctionMode):
    """While it is on, products and embeddings of weights in 16 bits are in float32."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Widen what is given to a product, and what comes out of an embedding."""
        if function in (functional.linear, torch.bmm):
            args = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        result = function(*args, **(kwargs or {}))
        return result.float() if function is functional.embedding else result


class StressedWeights(RandomWeights):
    """Random weights in which attention counts and errors do not grow: see STRESSED and GAIN.

    `counts_from_one`: the model adds 1 to the weights of norms, as Gemma does.
    """

    counts_from_one = False

    def _fill(self, tensor: Tensor, name: str) -> None:
        super()._fill(tensor, name)
        parts = name.split(".")
        if self.counts_from_one and parts[-2].endswith("norm"):
            tensor.sub_(1)
        if tensor.ndim > 1 and tensor.is_floating_point():
            tensor.mul_(GAIN / DEVIATION / tensor.shape[-1] ** 0.5)
        if parts[-1] == "weight" and parts[-2] in STRESSED:
            tensor.mul_(STRESSED[parts[-2]])


def engine_of(shape: str, device: str, fields: Mapping[str, Any], **options: Any) -> Engine:
    """An engine of a shape with random weights and `SwitchedOps`; `fields` replace the config's."""
    from pagedcore.engine.build import build_engine
    from pagedcore.plugins import register

    settings = workspace.shape_options(shape, backend="switched", device=device, **options)
    path = Path(settings["model"], "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(fields)))
    plugins = register({"switched": _plugin(), "core": _core()})
    return build_engine(EngineConfig.from_options(**settings), plugins=plugins)


def _core() -> ModuleType:
    import pagedcore.builtin

    return pagedcore.builtin


def _plugin() -> object:
    import pagedcore_models

    offered = pagedcore_models.pagedcore_models()

    class Plugin:
        """Our models with stressed weights, and `SwitchedOps`."""

        @hookimpl
        def pagedcore_backends(self) -> Mapping[str, Callable[[str], Any]]:
            return {"switched": SwitchedOps}

        @hookimpl
        def pagedcore_models(self) -> Mapping[str, Callable[[], type[Model]]]:
            return {name: partial(_stressed, load) for name, load in offered.items() if name != "*"}

    return Plugin()


def _stressed(load: Callable[[], type[Model]]) -> type[Model]:
    model_class = load()

    class Stressed(model_class):  # type: ignore[misc, valid-type]  # a class that is a variable
        def __init__(self, build: ModelBuild) -> None:
            weights = StressedWeights(build.dtype, build.device, seed=0)
            weights.counts_from_one = str(build.config["model_type"]).startswith("gemma")
            super().__init__(replace(build, weights=weights))

    return Stressed
