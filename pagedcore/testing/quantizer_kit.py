"""The quantizer kit: are products as exact, and weights as small, as a format promises?

Two matrices that become one are stored as the case says, and loaded as a start does: of shapes
alone first, then of weights. Products are compared with those of the float matrices, within the
promised error, and with those of what the stored tensors stand for, up to rounding. Experts have a
module of their own, `experts_kit.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from pagedcore.errors import ConfigError, ModelError, PluginError
from pagedcore.execution.model import Weights
from pagedcore.execution.quantizer import LinearMethod, Quantizer
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.checks import Check
from pagedcore.testing.experts_kit import experts_checks
from pagedcore.testing.quantizer_case import LAYERS, QuantizerCase
from pagedcore.testing.stored_tensors import NOT_EQUAL, bytes_kept, load, stored, without

IN_FEATURES = 256
OUT_FEATURES = (96, 32)
"""Of two matrices that are multiplied as one."""

NUM_TOKENS = (1, 5, 33)

CUT = 32
"""Rows that a matrix which lies has less: packed words of any format can hold the rest."""

Factory = Callable[[Mapping[str, Any]], Quantizer]


def quantizer_checks(name: str, factory: Factory, case: QuantizerCase) -> Iterator[Check]:
    """What one format promises, in its case and each variant of it."""
    subject = f"quantizer {name}"
    for variant, each in {"": case, **case.variants}.items():
        drawn = _Drawn(each)
        promises: dict[str, Callable[[], str]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            words = f"products in {str(dtype).removeprefix('torch.')}"
            promises[words] = partial(check_products, factory, drawn, dtype)
        if each.stands_for is not None:
            promises["equal to what is stored"] = partial(check_equal, factory, drawn)
        promises["size"] = partial(check_size, factory, drawn)
        promises["refuses tensors that are not there"] = partial(check_missing, factory, drawn)
        promises["refuses shapes that lie"] = partial(check_shapes, factory, drawn)
        for claim, test in {**promises, **experts_checks(factory, each)}.items():
            yield Check(subject, ": ".join(filter(None, [variant, claim])), test)
        for lie in each.lies:
            words = f"refuses {dict(lie)}"
            yield Check(subject, words, partial(check_settings, factory, lie))


class _Drawn:
    """A case with two matrices and their biases; what is stored of them is made once."""

    def __init__(self, case: QuantizerCase) -> None:
        self.case = case

    @cached_property
    def matrices(self) -> list[Tensor]:
        """[out, in] float32 of each part."""
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(rows, IN_FEATURES, generator=generator) / IN_FEATURES**0.5
            for rows in OUT_FEATURES
        ]

    @cached_property
    def biases(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [torch.randn(rows, generator=generator) for rows in OUT_FEATURES]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What the checkpoint holds."""
        return self._stored(self.matrices)

    @property
    def cut(self) -> dict[str, Tensor]:
        """The same, but the first matrix has CUT rows too few."""
        first, *rest = self.matrices
        return self._stored([first[CUT:].contiguous(), *rest])

    @property
    def whole(self) -> Tensor:
        return torch.cat(self.matrices)

    @property
    def bias(self) -> Tensor:
        return torch.cat(self.biases)

    def _stored(self, matrices: list[Tensor]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, matrix, bias in zip(LAYERS, matrices, self.biases, strict=True):
            tensors |= stored(self.case, name, matrix)
            tensors[f"{name}.bias"] = bias
        return tensors


def check_products(factory: Factory, drawn: _Drawn, dtype: torch.dtype) -> str:
    """Compare with products of the float matrices, with one and several rows, joined and biased."""
    ops, case = TorchOps("cpu"), drawn.case
    method = _load(factory, drawn, drawn.tensors, ops, dtype)
    whole, bias = drawn.whole.double(), drawn.bias.double()
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, IN_FEATURES, generator=generator).to(dtype)
        got = _apply(method, x, ops)
        if got.shape != (num_tokens, len(whole)) or got.dtype != dtype:
            raise PluginError(
                f"a product is {got.dtype} {list(got.shape)}; {dtype} "
                f"{[num_tokens, len(whole)]} was expected"
            )
        exact = x.double() @ whole.T + bias
        largest = max(largest, float((got.double() - exact).norm() / exact.norm()))
    if not largest <= case.max_error:
        raise PluginError(f"the error is {largest:.3g}; {case.max_error:.3g} was promised")
    return f"error {largest:.2g}, at most {case.max_error:.2g}"


def check_equal(factory: Factory, drawn: _Drawn) -> str:
    """Compare with products of the matrices that are stored: its columns, and of random rows."""
    ops, case = TorchOps("cpu"), drawn.case
    assert case.stands_for is not None, "else there is nothing to compare with"
    method = _load(factory, drawn, drawn.tensors, ops, torch.float32)
    meant = torch.cat([case.stands_for(matrix) for matrix in drawn.matrices])
    rows = [torch.eye(IN_FEATURES)]
    if not case.rounds_inputs:
        rows.append(torch.randn(7, IN_FEATURES, generator=torch.Generator().manual_seed(3)))
    x = torch.cat(rows)
    off = float((_apply(method, x, ops) - (x @ meant.T + drawn.bias)).abs().max())
    if not off <= NOT_EQUAL:
        raise PluginError(f"products differ from those with what is stored by up to {off:.3g}")
    return f"within {off:.1g}"


def check_size(factory: Factory, drawn: _Drawn) -> str:
    """Add up what a loaded layer keeps, biases aside."""
    ops, case = TorchOps("cpu"), drawn.case
    method = _load(factory, drawn, drawn.tensors, ops, torch.bfloat16)
    bias = 2 * drawn.bias.numel()
    per_weight = (bytes_kept(method, ops) - bias) / drawn.whole.numel()
    if not per_weight <= case.max_bytes:
        raise PluginError(
            f"it keeps {per_weight:.3g} bytes per weight; {case.max_bytes:.3g} promised"
        )
    return f"{per_weight:.3g} bytes per weight"


def check_missing(factory: Factory, drawn: _Drawn) -> str:
    """Leave out each tensor in turn: the build of shapes alone must name it."""
    for name in drawn.tensors:
        if not any(name.endswith(f".{each}") for each in drawn.case.optional):
            rest = without(drawn.tensors, name)
            _expect_refusal(factory, drawn, rest, f"a checkpoint without {name!r}")
    return ""


def check_shapes(factory: Factory, drawn: _Drawn) -> str:
    """Give the first matrix some rows too few."""
    _expect_refusal(factory, drawn, drawn.cut, "a matrix with too few rows")
    return ""


def check_settings(factory: Factory, lie: Mapping[str, Any]) -> str:
    """Raise PluginError unless settings that lie are refused."""
    try:
        factory(lie)
    except (ModelError, ConfigError) as error:
        return str(error)
    raise PluginError("they were taken")


def _expect_refusal(
    factory: Factory, drawn: _Drawn, tensors: Mapping[str, Tensor], what: str
) -> None:
    try:
        _load(factory, drawn, tensors, TorchOps("cpu"), torch.float32)
    except ModelError:
        return
    raise PluginError(f"{what} was taken")


def _load(
    factory: Factory,
    drawn: _Drawn,
    tensors: Mapping[str, Tensor],
    ops: TorchOps,
    dtype: torch.dtype,
) -> LinearMethod:
    quantizer = factory(drawn.case.settings)

    def take(weights: Weights) -> LinearMethod:
        rows = list(OUT_FEATURES)
        return quantizer.linear(weights, ops, LAYERS, IN_FEATURES, rows, bias=True, dim=0)

    return load(take, tensors, dtype)


def _apply(method: LinearMethod, x: Tensor, ops: TorchOps) -> Tensor:
    return method.apply(ops.quantize(x) if method.wants_quantized(len(x), x.dtype) else x)
