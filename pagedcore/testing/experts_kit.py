"""Experts of a format: as exact, and as small, as it promises?

Experts with tensors of their own, which every quantizer takes, and those in one tensor, where the
case has any, are mixed over random rows. What comes out is compared with the plain `Ops.moe` of the
float matrices, within the promised error, and of what the stored tensors stand for, up to rounding.

E experts   T tokens   F expert width   h hidden size
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pagedcore.errors import ModelError, PluginError
from pagedcore.execution.expert_ops import Clamp, Experts
from pagedcore.execution.model import Weights
from pagedcore.execution.quantizer import ExpertsMethod, Quantizer
from pagedcore.execution.stacked_experts import gates_first, stacked_experts
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.quantizer_case import EXPERTS, NUM_EXPERTS, QuantizerCase, StackedCase
from pagedcore.testing.stored_tensors import NOT_EQUAL, bytes_kept, load, stored, without

if TYPE_CHECKING:
    from pagedcore.testing.quantizer_kit import Factory

H, WIDTH = 256, 256
NUM_CHOSEN = 2
NUM_TOKENS = (1, 6, 40)
CLAMP = Clamp(alpha=1.702, limit=7.0)

FACTOR = 3.0
"""The error of experts, in that of one product: theirs are three, two of them multiplied, and the
kit's products have biases, which have no error."""

Tensors = dict[str, Tensor]


def experts_checks(factory: "Factory", case: QuantizerCase) -> Mapping[str, Callable[[], str]]:
    """What a format promises of experts, by its claims."""
    drawn = _Drawn(case)
    checks = {
        "experts": partial(check_experts, factory, drawn),
        "refuses experts that are not there": partial(check_missing, factory, drawn),
    }
    if case.stacked is not None:
        checks["stacked experts"] = partial(check_stacked, factory, case, case.stacked)
    return checks


class _Drawn:
    """A case with the matrices of some experts; what is stored of them is made once."""

    def __init__(self, case: QuantizerCase) -> None:
        self.case = case

    @cached_property
    def matrices(self) -> Mapping[str, list[Tensor]]:
        """Gates and their partners [F, h], and the matrices [h, F] behind them."""
        generator = torch.Generator().manual_seed(4)
        shapes = {"gate_proj": (WIDTH, H), "up_proj": (WIDTH, H), "down_proj": (H, WIDTH)}
        return {
            part: [
                torch.randn(rows, columns, generator=generator) / columns**0.5
                for _ in range(NUM_EXPERTS)
            ]
            for part, (rows, columns) in shapes.items()
        }

    @cached_property
    def tensors(self) -> Tensors:
        """What the checkpoint holds."""
        tensors: Tensors = {}
        for part, matrices in self.matrices.items():
            for e, matrix in enumerate(matrices):
                tensors |= stored(self.case, f"{EXPERTS}.{e}.{part}", matrix)
        return tensors

    def experts(self, change: Callable[[Tensor], Tensor]) -> Experts:
        """Each matrix changed, as the plain `Ops.moe` takes them."""
        gate, up, down = (
            torch.stack([change(matrix) for matrix in matrices])
            for matrices in self.matrices.values()
        )
        return Experts(gate_up=torch.cat([gate, up], 1), down=down)


def check_experts(factory: "Factory", drawn: _Drawn) -> str:
    """Mix experts in both types; a format that has none must refuse them with a ModelError."""
    case, ops = drawn.case, TorchOps("cpu")
    remarks = []
    for dtype in (torch.float32, torch.bfloat16):
        try:
            method = _load(factory, drawn, drawn.tensors, ops, dtype)
        except ModelError as error:
            if case.max_expert_bytes is not None:
                raise
            return f"refused: {error!s:.80}"
        exact = drawn.experts(lambda matrix: matrix)
        off = _error(method, exact, ops, dtype)
        if not off <= FACTOR * case.max_error:
            raise PluginError(
                f"in {dtype} the error is {off:.3g}; {FACTOR} times {case.max_error:.3g}, that "
                "of a product, was promised"
            )
        remarks.append(f"{off:.2g}")
        if dtype == torch.float32 and case.stands_for is not None and not case.rounds_inputs:
            _expect_equal(method, drawn.experts(case.stands_for), ops)
    per_weight = bytes_kept(method, ops) / (3 * NUM_EXPERTS * H * WIDTH)
    _expect_small(per_weight, case.max_expert_bytes)
    return f"errors {', '.join(remarks)}; {per_weight:.3g} bytes per weight"


def check_missing(factory: "Factory", drawn: _Drawn) -> str:
    """Leave out each tensor of an expert in turn: the build of shapes alone must name it."""
    last = f"{EXPERTS}.{NUM_EXPERTS - 1}."
    for name in drawn.tensors:
        is_optional = any(name.endswith(f".{each}") for each in drawn.case.optional)
        if name.startswith(last) and not is_optional:
            try:
                _load(factory, drawn, without(drawn.tensors, name), TorchOps("cpu"), torch.float32)
            except ModelError:
                continue
            raise PluginError(f"a checkpoint without {name!r} was taken")
    return ""


def check_stacked(factory: "Factory", case: QuantizerCase, stacked: StackedCase) -> str:
    """Mix experts that are stored in one tensor, with the biases and the activation of GPT-OSS."""
    ops = TorchOps("cpu")
    generator = torch.Generator().manual_seed(5)
    shapes = {"gate_up_proj": (2 * WIDTH, H), "down_proj": (H, WIDTH)}
    tensors: Tensors = {}
    matrices, biases = [], []
    for part, (rows, columns) in shapes.items():
        matrix = torch.randn(NUM_EXPERTS, rows, columns, generator=generator) / columns**0.5
        bias = torch.randn(NUM_EXPERTS, rows, generator=generator)
        for suffix, tensor in stacked.store(matrix).items():
            tensors[f"{EXPERTS}.{part}{suffix}"] = tensor
        tensors[f"{EXPERTS}.{part}_bias"] = bias
        matrices.append(matrix)
        biases.append(bias)

    def experts(change: Callable[[Tensor], Tensor]) -> Experts:
        return Experts(
            gate_up=gates_first(change(matrices[0])),
            down=change(matrices[1]),
            gate_up_bias=gates_first(biases[0]),
            down_bias=biases[1],
            clamp=CLAMP,
        )

    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        method = _load_stacked(factory(case.settings), tensors, ops, dtype)
        errors.append(_error(method, experts(lambda matrix: matrix), ops, dtype))
        if dtype == torch.float32:
            _expect_equal(method, experts(stacked.stands_for), ops)
    if not max(errors) <= FACTOR * stacked.max_error:
        raise PluginError(
            f"the error is {max(errors):.3g}; {FACTOR} times {stacked.max_error:.3g}, that of a "
            "product, was promised"
        )
    num_biases = sum(bias.numel() for bias in biases)
    per_weight = (bytes_kept(method, ops) - 2 * num_biases) / sum(m.numel() for m in matrices)
    _expect_small(per_weight, stacked.max_bytes)
    return f"errors {errors[0]:.2g}, {errors[1]:.2g}; {per_weight:.3g} bytes per weight"


def _expect_small(per_weight: float, promised: float | None) -> None:
    if promised is not None and not per_weight <= promised:
        raise PluginError(f"it keeps {per_weight:.3g} bytes per weight; {promised:.3g} promised")


def _mixed(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T, h], and the weights and numbers of the experts of each."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, H, generator=generator)
    scores = torch.randn(num_tokens, NUM_EXPERTS, generator=generator)
    weights, chosen = scores.softmax(-1).topk(NUM_CHOSEN, -1)
    return x, weights, chosen.int()


def _error(method: ExpertsMethod, exact: Experts, ops: TorchOps, dtype: torch.dtype) -> float:
    """The largest error of mixtures, as a share of what the float matrices give."""
    largest = 0.0
    for num_tokens in NUM_TOKENS:
        x, weights, chosen = _mixed(num_tokens)
        got = method.apply(x.to(dtype), weights, chosen)
        if got.shape != x.shape or got.dtype != dtype:
            raise PluginError(
                f"a mixture is {got.dtype} {list(got.shape)}; {dtype} {list(x.shape)} was expected"
            )
        wanted = ops.moe(x.to(dtype).float(), weights, chosen, exact)
        largest = max(largest, float((got.float() - wanted).norm() / wanted.norm()))
    return largest


def _expect_equal(method: ExpertsMethod, meant: Experts, ops: TorchOps) -> None:
    for num_tokens in NUM_TOKENS:
        mixed = _mixed(num_tokens)
        off = float((method.apply(*mixed) - ops.moe(*mixed, meant)).abs().max())
        if not off <= NOT_EQUAL:
            raise PluginError(f"mixtures differ from those of what is stored by up to {off:.3g}")


def _load(
    factory: "Factory", drawn: _Drawn, tensors: Tensors, ops: TorchOps, dtype: torch.dtype
) -> ExpertsMethod:
    quantizer = factory(drawn.case.settings)

    def take(weights: Weights) -> ExpertsMethod:
        return quantizer.experts(weights, ops, EXPERTS, NUM_EXPERTS, H, WIDTH)

    return load(take, tensors, dtype)


def _load_stacked(
    quantizer: Quantizer, tensors: Mapping[str, Any], ops: TorchOps, dtype: torch.dtype
) -> ExpertsMethod:
    def take(weights: Weights) -> ExpertsMethod:
        return stacked_experts(quantizer, weights, ops, EXPERTS, NUM_EXPERTS, H, WIDTH, CLAMP)

    return load(take, tensors, dtype)
