"""The compiler for GPUs takes the kernels too, not only the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SPILLED = {"_latent_extend_kernel": 128}  # at its end, where sums become outputs
SCRIPT = Path(__file__).with_name("compile_for_gpus.py")


@pytest.mark.parametrize(("capability", "shared_memory"), [(80, 166_912), (90, 232_448)])
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
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert {"_decode_kernel", "_extend_kernel", "_merge_kernel"} <= {name for name, _, _ in kernels}
    for name, shared, spilled in kernels:
        assert int(shared) <= shared_memory, name
        assert int(spilled) <= SPILLED.get(name, 64), name
