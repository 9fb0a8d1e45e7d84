"""A kernel that does not compile is replaced by plain torch, with one warning that names it."""

import logging
import subprocess

import pytest
import torch
from triton.runtime.errors import OutOfResources

from pagedcore.errors import ConfigError
from pagedcore_kernels import backend, norms
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.steps import make_step

FAILURES = [
    OutOfResources(300_000, 232_448, "shared memory"),
    RuntimeError("PassManager::run failed"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    subprocess.CalledProcessError(1, "gcc"),
]


@pytest.fixture
def x(device):
    return torch.randn(3, 8, device=device)


def broken(failure):
    def kernel(*args, **kwargs):
        raise failure

    return kernel


@pytest.mark.parametrize("failure", FAILURES, ids=["resources", "passes", "compiler", "cc"])
def test_plain_torch_takes_the_place_of_a_kernel_that_does_not_compile(
    failure, x, device, monkeypatch, caplog
):
    ops, weight = TritonOps(device), torch.ones(8, device=device)
    want = ops.rms_norm(x, weight, 1e-5)
    ops.supports_graphs = True
    monkeypatch.setattr(norms, "rms_norm", broken(failure))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), want)
    assert len(caplog.records) == 1
    assert "'rms_norm'" in caplog.text
    assert ops.supports_graphs
    ops.silu_mul(x)
    assert ops.replaced == {"rms_norm"}


def test_attention_falls_back_on_the_same_cache_and_ends_graphs(device, monkeypatch):
    step = make_step([(1, 40), (7, 20)], device=device)
    ops = TritonOps(device)
    ops.supports_graphs = True
    ops.begin_step(step.batch)
    want = ops.attention(step.qkv, step.num_heads, 0.2, step.cache, step.batch)
    monkeypatch.setattr(backend, "decode_attention", broken(FAILURES[0]))
    got = ops.attention(step.qkv, step.num_heads, 0.2, step.cache, step.batch)
    torch.testing.assert_close(got, want)
    assert ops.replaced == {"attention"}
    assert not ops.supports_graphs


@pytest.mark.parametrize("failure", [RuntimeError("device-side assert"), ValueError("no")])
def test_other_errors_are_not_hidden(failure, x, device, monkeypatch):
    monkeypatch.setattr(norms, "rms_norm", broken(failure))
    with pytest.raises(type(failure), match=str(failure)):
        TritonOps(device).rms_norm(x, torch.ones(8, device=device), 1e-5)


def test_a_device_without_kernels_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"NVIDIA GPU.*'cuda:0'.*backend='torch'"):
        TritonOps("cuda:0")


def test_an_old_gpu_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match=r"8\.0 or later, and Tesla T4 has 7\.5"):
        TritonOps("cuda:0")
