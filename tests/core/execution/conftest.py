"""A paged cache in which sequences run step by step, and the backends that a CPU has."""

from dataclasses import dataclass

import pytest
import torch

from pagedcore.cache_spec import CacheSpec
from pagedcore.errors import ConfigError
from pagedcore.execution.kv_formats import as_is
from pagedcore.execution.native.ops import NativeOps
from pagedcore.execution.ops import StepBatch
from pagedcore.execution.torch_ops import TorchOps

SCALE = 0.3


@dataclass
class Sequence:
    """All heads [L, H + 2K, D] of a sequence, and the blocks that hold its past."""

    heads: torch.Tensor
    blocks: list[int]


class Pool:
    """A cache in which sequences run step by step, in blocks that nothing orders."""

    def __init__(
        self,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        *,
        block_size=4,
        window=None,
        soft_cap=None,
        has_sinks=False,
        dtype=torch.float32,
        kv_format=None,
        num_blocks=400,
        seed=0,
        ordered=False,
        ops=None,
    ):
        self.ops = ops or TorchOps("cpu")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.block_size, self.window, self.soft_cap = block_size, window, soft_cap
        self.dtype = dtype
        self.scale = SCALE
        self.random = torch.Generator().manual_seed(seed)
        self.sinks = 3 * torch.randn(num_heads, generator=self.random) if has_sinks else None
        spec = CacheSpec(num_kv_heads=num_kv_heads, head_dim=head_dim, window=window)
        self.kv_format = kv_format or as_is(dtype)
        self.cache = self.ops.new_cache(
            spec, 0, num_blocks, block_size, self.kv_format, torch.device("cpu")
        )
        free = torch.randperm(num_blocks - 1, generator=self.random) + 1
        self.free = list(range(num_blocks - 1, 0, -1)) if ordered else free.tolist()

    def sequence(self, length):
        """Random heads, of which keys and values are numbers that the cache's format has."""
        shape = (length, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        heads = torch.randn(shape, generator=self.random).to(self.dtype)
        past = heads[:, self.num_heads :]
        past.copy_(self.kv_format.decode(*self.kv_format.encode(past), self.dtype))
        count = -(-length // self.block_size)
        return Sequence(heads, [self.free.pop() for _ in range(count)])

    def step(self, runs, *, num_padding=0):
        """Run `new` tokens of each sequence, up to its position `total`: outputs of each."""
        runs = sorted(runs, key=lambda run: run[1] != 1)
        single = sum(new == 1 for _, new, _ in runs)
        runs[single:single] = [(None, 1, 0)] * num_padding
        qkv = torch.cat([self._tokens(*run) for run in runs])
        batch = self.batch(runs, single + num_padding)
        self.ops.begin_step(batch)
        self.ops.rope_and_cache(qkv, self.num_heads, None, None, self.cache, batch)
        out = self.ops.attention(
            qkv, self.num_heads, SCALE, self.cache, batch, self.soft_cap, self.sinks
        )
        assert out.is_contiguous()
        assert out.dtype == self.dtype
        pieces = out.view(len(qkv), self.num_heads, -1).split([new for _, new, _ in runs])
        return [(*run, piece) for run, piece in zip(runs, pieces, strict=True) if run[0]]

    def _tokens(self, sequence, new, total):
        if sequence is None:
            return torch.randn(1, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim).to(
                self.dtype
            )
        return sequence.heads[total - new : total].flatten(1).clone()

    def batch(self, runs, num_single):
        """Rows of the table are neither in order nor clean: behind a sequence, others' blocks."""
        num_rows, width = len(runs) + 2, 2 + max(len(s.blocks) if s else 0 for s, _, _ in runs)
        table = torch.randint(0, 50, (1, num_rows, width), generator=self.random).int()
        rows = torch.randperm(num_rows, generator=self.random)[: len(runs)]
        positions, slots = [], []
        for (sequence, new, total), row in zip(runs, rows.tolist(), strict=True):
            if sequence is None:
                positions, slots = [*positions, 0], [*slots, 0]
                continue
            table[0, row, : len(sequence.blocks)] = torch.tensor(sequence.blocks).int()
            for p in range(total - new, total):
                positions.append(p)
                block = sequence.blocks[p // self.block_size]
                slots.append(block * self.block_size + p % self.block_size)
        counts = torch.tensor([0] + [new for _, new, _ in runs])
        return StepBatch(
            positions=torch.tensor(positions),
            rows=rows.int(),
            query_start=counts.cumsum(0).int(),
            context_len=torch.tensor([total for _, _, total in runs]).int(),
            block_tables=table,
            slots=torch.tensor([slots]),
            num_single=num_single,
            max_query_len=int(counts.max()),
            max_context_len=max(total for _, _, total in runs),
        )

    def expected(self, sequence, new, total):
        """Outputs [new, H, D] in float64, one query after the other."""
        query, key, value = sequence.heads.double().split(
            [self.num_heads, self.num_kv_heads, self.num_kv_heads], 1
        )
        out = torch.empty(new, self.num_heads, self.head_dim, dtype=torch.float64)
        for i, position in enumerate(range(total - new, total)):
            begin = 0 if self.window is None else max(position - self.window + 1, 0)
            for head in range(self.num_heads):
                shared = head * self.num_kv_heads // self.num_heads
                scores = key[begin : position + 1, shared] @ query[position, head] * SCALE
                if self.soft_cap is not None:
                    scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
                if self.sinks is not None:
                    scores = torch.cat([scores, self.sinks[head, None].double()])
                weights = scores.softmax(0)[: position + 1 - begin]
                out[i, head] = weights @ value[begin : position + 1, shared]
        return out

    def check(self, results, tolerance=2e-6):
        for sequence, new, total, out in results:
            want = self.expected(sequence, new, total)
            torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="session")
def new_pool():
    return Pool


@pytest.fixture(scope="session")
def backends():
    """Operations by name: those in C only where they run."""
    found = {"torch": TorchOps("cpu")}
    try:
        found["native"] = NativeOps("cpu")
    except ConfigError as error:
        missing = ("needs a processor", "no C compiler")
        if not any(reason in str(error) for reason in missing):
            raise  # a kernel that does not compile is no reason to skip its tests
    return found


@pytest.fixture(scope="session")
def native(backends):
    if "native" not in backends:
        pytest.skip("the kernels in C do not run here")
    return backends["native"]
