"""The quantizer kit: are products as exact, and weights as small, as a format promises?"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from pagedcore.errors import ConfigError, ModelError, PluginError
from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.quantizer import LinearMethod, Quantizer
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.checks import Check
from pagedcore.testing.quantizer_case import QuantizerCase

IN_FEATURES = 256
OUT_FEATURES = {"first": 96, "second": 32}
"""Of two matrices that are multiplied as one."""

NUM_TOKENS = (1, 5, 33)
PREFIX = "layer"

Factory = Callable[[Mapping[str, Any]], Quantizer]


def quantizer_checks(name: str, factory: Factory, case: QuantizerCase) -> Iterator[Check]:
    """What one format promises."""
    subject = f"quantizer {name}"
    for dtype in (torch.float32, torch.bfloat16):
        words = str(dtype).removeprefix("torch.")
        yield Check(subject, f"products in {words}", partial(check_products, factory, case, dtype))
    yield Check(subject, "size", partial(check_size, factory, case))
    yield Check(
        subject, "refuses tensors that are not there", partial(check_missing, factory, case)
    )
    yield Check(subject, "refuses shapes that lie", partial(check_shapes, factory, case))
    for lie in case.lies:
        yield Check(subject, f"refuses {dict(lie)}", partial(check_settings, factory, lie))


def check_products(factory: Factory, case: QuantizerCase, dtype: torch.dtype) -> str:
    """Compare with products of the float matrices, with one and several rows, joined and biased."""
    ops = TorchOps("cpu")
    tensors, whole, bias = _draw(case)
    with tempfile.TemporaryDirectory(prefix="pagedcore-quantizer-kit-") as folder:
        method = _load(factory(case.settings), Path(folder), tensors, ops, dtype)
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, IN_FEATURES, generator=generator).to(dtype)
        given = ops.quantize(x) if method.wants_quantized(num_tokens, dtype) else x
        got = method.apply(given)
        if got.shape != (num_tokens, len(whole)) or got.dtype != dtype:
            raise PluginError(
                f"a product is {got.dtype} {list(got.shape)}; {dtype} "
                f"{[num_tokens, len(whole)]} was expected"
            )
        exact = x.double() @ whole.double().T + bias.double()
        largest = max(largest, float((got.double() - exact).norm() / exact.norm()))
    if not largest <= case.max_error:
        raise PluginError(f"the error is {largest:.3g}; {case.max_error:.3g} was promised")
    return f"error {largest:.2g}, at most {case.max_error:.2g}"


def check_size(factory: Factory, case: QuantizerCase) -> str:
    """Add up what a loaded layer keeps, biases aside."""
    ops = TorchOps("cpu")
    tensors, whole, bias = _draw(case)
    with tempfile.TemporaryDirectory(prefix="pagedcore-quantizer-kit-") as folder:
        method = _load(factory(case.settings), Path(folder), tensors, ops, torch.bfloat16)
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in _tensors_of(method, {id(ops)})}
    per_weight = (sum(kept.values()) - 2 * bias.numel()) / whole.numel()
    if not per_weight <= case.max_bytes:
        raise PluginError(
            f"it keeps {per_weight:.3g} bytes per weight; {case.max_bytes:.3g} promised"
        )
    return f"{per_weight:.3g} bytes per weight"


def check_missing(factory: Factory, case: QuantizerCase) -> str:
    """Leave out each tensor in turn: the build of shapes alone must name it."""
    tensors, _, _ = _draw(case)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        _expect_refusal(factory, case, rest, f"a checkpoint without {name!r}")
    return ""


def check_shapes(factory: Factory, case: QuantizerCase) -> str:
    """Give the first matrix one row too few."""
    tensors, _, _ = _draw(case, cut=1)
    _expect_refusal(factory, case, tensors, "a matrix with too few rows")
    return ""


def check_settings(factory: Factory, lie: Mapping[str, Any]) -> str:
    """Raise PluginError unless settings that lie are refused."""
    try:
        factory(lie)
    except (ModelError, ConfigError) as error:
        return str(error)
    raise PluginError("they were taken")


def _expect_refusal(
    factory: Factory, case: QuantizerCase, tensors: Mapping[str, Tensor], what: str
) -> None:
    with tempfile.TemporaryDirectory(prefix="pagedcore-quantizer-kit-") as folder:
        try:
            _load(factory(case.settings), Path(folder), tensors, TorchOps("cpu"), torch.float32)
        except ModelError:
            return
    raise PluginError(f"{what} was taken")


def _draw(case: QuantizerCase, cut: int = 0) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The checkpoint's tensors; the whole matrix; the whole bias. `cut` rows are left out."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    matrices: list[Tensor] = []
    biases: list[Tensor] = []
    for part, rows in OUT_FEATURES.items():
        matrix = torch.randn(rows, IN_FEATURES, generator=generator) / IN_FEATURES**0.5
        bias = torch.randn(rows, generator=generator)
        kept = matrix[cut:] if not matrices else matrix
        stored = {"weight": kept} if case.store is None else case.store(kept.contiguous())
        tensors |= {f"{PREFIX}.{part}.{name}": tensor for name, tensor in stored.items()}
        tensors[f"{PREFIX}.{part}.bias"] = bias
        matrices.append(matrix)
        biases.append(bias)
    return tensors, torch.cat(matrices), torch.cat(biases)


def _load(
    quantizer: Quantizer,
    folder: Path,
    tensors: Mapping[str, Tensor],
    ops: TorchOps,
    dtype: torch.dtype,
) -> LinearMethod:
    """As a start does: of shapes alone first, then of weights."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text("{}", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    names = [f"{PREFIX}.{part}" for part in OUT_FEATURES]
    rows = list(OUT_FEATURES.values())
    quantizer.linear(checkpoint.shapes(dtype), ops, names, IN_FEATURES, rows, bias=True, dim=0)
    checkpoint.check_all_taken()
    weights = checkpoint.tensors(dtype, torch.device("cpu"))
    with torch.inference_mode():
        method = quantizer.linear(weights, ops, names, IN_FEATURES, rows, bias=True, dim=0)
    weights.finish()
    return method


def _tensors_of(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that an object holds on to, through its attributes and containers."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    if isinstance(thing, type | ModuleType | FunctionType):
        return
    if isinstance(thing, Mapping):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        parts = list(thing)
    else:
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [getattr(thing, name) for name in slots if hasattr(thing, name)]
        parts += list(getattr(thing, "__dict__", {}).values())
    for part in parts:
        yield from _tensors_of(part, seen)
