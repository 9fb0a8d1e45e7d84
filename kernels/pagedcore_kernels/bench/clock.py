"""Times, of work that does not find its data in the L2 cache."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from pagedcore.execution.kernel_bench import Time

ROTATED_BYTES = 256 << 20
"""What the calls of one sample read together: five times the L2 cache of an H200."""


MIN_CALLS = 24
"""In one sample: the graph's own launch, 4 us, must not count."""


def num_rotations(bytes_read: int, most: int = 128) -> int:
    """Calls, on data of their own, that it takes to pass through the L2 cache."""
    return max(1, min(most, -(-ROTATED_BYTES // max(bytes_read, 1))))


def time_calls(calls: Sequence[Callable[[], object]], *, budget_s: float = 0.1) -> Time:
    """Time one call: on a GPU, all calls in turn in one CUDA graph, many times over.

    Few calls are repeated in the graph; together they must read more than the L2 cache holds.
    """
    if not torch.cuda.is_available():
        started = time.perf_counter()
        calls[0]()
        passed = (time.perf_counter() - started) * 1e6
        return Time(passed, passed, passed, 1)
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
    calls = list(calls) * -(-MIN_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    first = _replay_us(graph)
    num_samples = max(20, min(200, int(budget_s * 1e6 / first)))
    samples = sorted(_replay_us(graph) / len(calls) for _ in range(num_samples))
    p99 = samples[int(0.99 * (num_samples - 1))]
    return Time(statistics.median(samples), samples[0], p99, num_samples)


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def copy_bandwidth(device: str, num_bytes: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    source = torch.randint(-(2**31), 2**31, (num_bytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    # Not `copy_`: in a graph that is a task of the copy engine, which is slower than kernels are.
    passed = time_calls([lambda: torch.bitwise_not(source, out=target)])
    return 2 * num_bytes / passed.median * 1e6


def product_rate(device: str, dtype: torch.dtype, size: int = 8192) -> float:
    """Operations per second of the library's product of two square matrices of random numbers."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    passed = time_calls([lambda: torch.mm(left, right, out=out)])
    return 2 * size**3 / passed.median * 1e6
