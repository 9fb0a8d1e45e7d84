"""What the device keeps of each row: its tokens, its blocks, and where its adapter lies.

    R rows    L longest sequence    G cache groups    M table entries per row

A row more than R stands for padding in graphs: its blocks are the null block, its tokens are 0.
Only what has changed is uploaded, in copies that nothing waits for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pagedcore.execution.logits import upload
from pagedcore.execution.lora_ops import NO_ADAPTER
from pagedcore.step import Admission, Int32

if TYPE_CHECKING:
    from pagedcore.execution.adapter_store import AdapterStore


class DeviceState:
    """Tokens, block tables and slots of adapters, by row."""

    def __init__(
        self,
        *,
        num_rows: int,
        max_model_len: int,
        num_groups: int,
        max_blocks: int,
        device: torch.device,
        adapters: "AdapterStore | None" = None,
    ) -> None:
        self.padding_row = num_rows
        """R: the row that no sequence has."""
        self._device = device
        self._width = max_model_len + 1
        # Torch leaves memory that nobody touches to others, so long tables cost little on the host.
        self.tokens = torch.empty(num_rows + 1, self._width, dtype=torch.int32, device=device)
        """[R + 1, L + 1] int32: known tokens, and those that steps in flight are drawing."""
        self.tokens[num_rows].zero_()
        self.block_tables = torch.zeros(
            num_groups, num_rows + 1, max_blocks, dtype=torch.int32, device=device
        )
        """[G, R + 1, M] int32."""
        self.adapter_slots: Tensor | None = None
        """[R + 1] int32: where each row's adapter lies, or NO_ADAPTER; None without adapters."""
        self._adapters = adapters
        if adapters is not None:
            self.adapter_slots = torch.full(
                (num_rows + 1,), NO_ADAPTER, dtype=torch.int32, device=device
            )

    @property
    def adapted_layers(self) -> int:
        """Number of the set of layers that adapters change; 0 before the first has come."""
        return 0 if self._adapters is None else self._adapters.adapted_layers

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Write what is known of rows that start."""
        if not admissions:
            return
        counts = np.array([len(a.token_ids) for a in admissions])
        starts = np.array([a.row for a in admissions], np.int64) * self._width
        ends = np.cumsum(counts)
        index = np.repeat(starts - ends + counts, counts) + np.arange(ends[-1])
        token_ids = np.concatenate([a.token_ids for a in admissions])
        flat = self.tokens.view(-1)
        flat.index_copy_(0, upload(index, self._device), upload(token_ids, self._device))
        if self.adapter_slots is not None:
            pairs = np.array([(a.row, a.adapter_slot) for a in admissions], np.int64)
            uploaded = upload(pairs, self._device)
            self.adapter_slots.index_copy_(0, uploaded[:, 0], uploaded[:, 1].int())

    def update_tables(self, updates: Int32) -> None:
        """Write block-table entries [N, 4]: group, row, index in the table, block."""
        if len(updates) == 0:
            return
        _, rows, entries = self.block_tables.shape
        index = (updates[:, 0].astype(np.int64) * rows + updates[:, 1]) * entries + updates[:, 2]
        both = upload(np.stack((index, updates[:, 3])), self._device)
        self.block_tables.view(-1).index_copy_(0, both[0], both[1].int())
