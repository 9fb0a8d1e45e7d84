"""Times, of work that does not find its data in the L2 cache."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

ROTATED_BYTES = 256 << 20
"""What the calls of one sample read together: five times the L2 cache of an H200."""


@dataclass(frozen=True, slots=True)
class Time:
    """Microseconds of one call."""

    median: float
    least: float
    p99: float
    num_samples: int


def num_rotations(bytes_read: int, most: int = 128) -> int:
    """Calls, on data of their own, that it takes to pass through the L2 cache."""
    return max(1, min(most, -(-ROTATED_BYTES // max(bytes_read, 1))))


def time_calls(calls: Sequence[Callable[[], object]], *, budget_s: float = 0.1) -> Time:
    """Time one call: on a GPU, all calls in turn in one CUDA graph, many times over."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        calls[0]()
        passed = (time.perf_counter() - started) * 1e6
        return Time(passed, passed, passed, 1)
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
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
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    passed = time_calls([lambda: target.copy_(source)])
    return 2 * num_bytes / passed.median * 1e6
