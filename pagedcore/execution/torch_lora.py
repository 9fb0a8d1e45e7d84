"""Adapters in plain torch: the tokens of each slot together, one slot after the other."""

import torch
from torch import Tensor
from torch.nn import functional

from pagedcore.execution.lora_ops import NO_ADAPTER, AdapterStep, LoraWeights


class TorchLoraOps:
    """`LoraOps` for `TorchOps`."""

    def add_lora(self, y: Tensor, x: Tensor, weights: LoraWeights, step: AdapterStep) -> None:
        """See `LoraOps.add_lora`."""
        if step.groups is None:
            slots = sorted(set(step.slots.tolist()) - {NO_ADAPTER})
            step.groups = [(slot, torch.where(step.slots == slot)[0]) for slot in slots]
        for slot, tokens in step.groups:
            inner = functional.linear(x[tokens], weights.a[slot]).split(weights.rank, 1)
            rows = weights.b[slot].split(weights.widths)
            parts = [functional.linear(h, b) for h, b in zip(inner, rows, strict=True)]
            y.index_add_(0, tokens, torch.cat(parts, 1))
