"""The compiler for GPUs takes the kernels that multiply few rows, round to 8 bits, and draw."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_products_and_draws.py")
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
}


@pytest.mark.parametrize(
    ("capability", "shared_memory", "kernels"),
    [(80, 166_912, EVERYWHERE), (90, 232_448, EVERYWHERE | IN_8_BITS)],
)
def test_every_kernel_compiles_and_fits(capability, shared_memory, kernels, tmp_path):
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in compiled} == kernels
    for name, shared, spilled in compiled:
        assert int(shared) <= shared_memory, name
        assert int(spilled) <= 64, name
