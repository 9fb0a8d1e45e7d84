"""Kernels compile for the GPU that they are meant for, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "compile_for_gpu.py"


def test_sampling_and_product_kernels_compile_and_fit_shared_memory(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == {
        "_summarise_kernel",
        "_draw_kernel",
        "_filtered_kernel",
        "_unlisted_kernel",
        "_row_kernel",
        "_dot_kernel",
        "_quantize_kernel",
        "_add_rms_norm_kernel",
        "_silu_mul_kernel",
    }
