"""Experts that are widened to 16 bits while they are loaded, whatever their format.

E experts   F expert width   h hidden size
"""

from collections.abc import Callable

from torch import Tensor

from pagedcore.execution.expert_ops import Experts

TakeWide = Callable[[str, int, int, int], Tensor]
"""Gives the layer of a name, [rows, columns], in the model's type; last, what may be divided."""


def take_wide_experts(take: TakeWide, prefix: str, num_experts: int, h: int, width: int) -> Experts:
    """The experts `{prefix}.{e}.gate_proj`, `.up_proj` and `.down_proj`, e < E."""
    gate_up: Tensor | None = None
    down: Tensor | None = None
    for e in range(num_experts):  # filled one by one, so that no expert is in memory twice
        gate = take(f"{prefix}.{e}.gate_proj", width, h, 0)
        own = len(gate)
        if gate_up is None or down is None:
            gate_up = gate.new_empty(num_experts, 2 * own, h)
            down = gate.new_empty(num_experts, h, own)
        gate_up[e, :own] = gate
        gate_up[e, own:] = take(f"{prefix}.{e}.up_proj", width, h, 0)
        down[e] = take(f"{prefix}.{e}.down_proj", h, width, 1)
    assert gate_up is not None, "a mixture has at least one expert"
    assert down is not None
    return Experts(gate_up=gate_up, down=down)
