"""The compiler for GPUs takes the kernels of packed experts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_packed_experts.py")
KERNELS = {"_order", "_combine", "packed_experts_kernel"}


@pytest.mark.parametrize(("capability", "shared_memory"), [(89, 101_376), (90, 232_448)])
def test_every_kernel_compiles_and_fits(capability, shared_memory, tmp_path):
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
    assert {name for name, _, _ in compiled} == KERNELS
    for name, shared, spilled in compiled:
        assert int(shared) <= shared_memory, name
        assert int(spilled) <= 64, name
