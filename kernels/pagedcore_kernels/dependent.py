"""Kernels that start while the one before them ends: programmatic dependent launch, from Hopper on.

A *dependent* kernel is launched before its predecessor has finished, so that its start-up hides
behind the predecessor's end: half a microsecond to one at each of hundreds of boundaries in a step.
Before it reads or writes anything that another kernel touches it waits until all before it are
done; what never changes, such as weights, it may ask for earlier. Every dependent kernel waits: one
that did not could be overtaken by what comes after it.
"""

from functools import cache

import torch
import triton
import triton.language as tl

MIN_CAPABILITY = (9, 0)


@triton.jit
def wait_for_predecessors(DEPENDENT: tl.constexpr):
    """Let the next kernel start, and wait for those before; nothing where DEPENDENT is false."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@cache
def can_depend(device: torch.device) -> bool:
    """Whether kernels on a device can be launched like this."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
