"""The compiler for GPUs takes the kernels that multiply few rows, round to 8 bits, and draw."""

import pytest

SCRIPT = "compile_products_and_draws.py"
EVERYWHERE = {
    "_summarise_kernel",
    "_draw_kernel",
    "_filtered_kernel",
    "_unlisted_kernel",
    "_row_kernel",
    "_dot_kernel",
    "packed_kernel",
    "_widen_kernel",
    "_quantize_int8_kernel",
    "_int8_kernel",
}
IN_8_BITS = {
    "_quantize_kernel",
    "_add_rms_norm_kernel",
    "_silu_mul_kernel",
    "_quantize_groups_kernel",
    "_block_kernel",
    "strips_kernel",
}


@pytest.mark.parametrize(
    ("capability", "shared_memory", "kernels"),
    [(80, 166_912, EVERYWHERE), (90, 232_448, EVERYWHERE | IN_8_BITS)],
)
def test_every_kernel_compiles_and_fits(capability, shared_memory, kernels, compile_kernels):
    compiled = compile_kernels(SCRIPT, capability)
    assert {name for name, _, _ in compiled} == kernels
    for name, shared, spilled in compiled:
        assert shared <= shared_memory, name
        assert spilled <= 64, name
