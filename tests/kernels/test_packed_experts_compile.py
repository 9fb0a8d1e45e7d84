"""The compiler for GPUs takes the kernels of packed experts."""

import pytest

SCRIPT = "compile_packed_experts.py"
KERNELS = {"_order", "_combine", "packed_experts_kernel"}


@pytest.mark.parametrize(("capability", "shared_memory"), [(89, 101_376), (90, 232_448)])
def test_every_kernel_compiles_and_fits(capability, shared_memory, compile_kernels):
    compiled = compile_kernels(SCRIPT, capability)
    assert {name for name, _, _ in compiled} == KERNELS
    for name, shared, spilled in compiled:
        assert shared <= shared_memory, name
        assert spilled <= 64, name
