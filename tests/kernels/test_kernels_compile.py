"""The compiler for GPUs takes the kernels too, not only the interpreter."""

import pytest

SPILLED = {"_latent_extend_kernel": 128}  # at its end, where sums become outputs
SCRIPT = "compile_for_gpus.py"


@pytest.mark.parametrize(("capability", "shared_memory"), [(80, 166_912), (90, 232_448)])
def test_every_kernel_compiles_and_fits(capability, shared_memory, compile_kernels):
    kernels = compile_kernels(SCRIPT, capability)
    assert {"_decode_kernel", "_extend_kernel", "_merge_kernel"} <= {name for name, _, _ in kernels}
    for name, shared, spilled in kernels:
        assert shared <= shared_memory, name
        assert spilled <= SPILLED.get(name, 64), name
