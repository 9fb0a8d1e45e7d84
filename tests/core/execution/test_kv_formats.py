"""What the cache makes of keys and values, by format."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pagedcore.cache_spec import CacheSpec, group_layers
from pagedcore.errors import ConfigError, PluginError
from pagedcore.execution.kv_cache import check_format
from pagedcore.execution.kv_formats import Int8, as_is, fp8
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.kv_format_kit import kv_format_checks

INT8 = Int8()
NUMBERS = st.one_of(
    st.floats(-limit, limit, width=32, allow_subnormal=False) for limit in (1.0, 2.0**99)
)
VECTORS = arrays("float32", array_shapes(min_dims=1, max_dims=3, max_side=9), elements=NUMBERS)


def through(kv_format, x):
    return kv_format.decode(*kv_format.encode(x), x.dtype)


@given(VECTORS)
def test_whole_numbers_are_half_a_step_off_at_most(vectors):
    x = torch.from_numpy(vectors)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((through(INT8, x) - x).abs() <= 0.501 * step + 1e-37).all()


@given(VECTORS)
def test_what_was_rounded_is_kept_as_it_is(vectors):
    once = through(INT8, torch.from_numpy(vectors))
    torch.testing.assert_close(through(INT8, once), once, atol=1e-37, rtol=1e-6)


@given(VECTORS, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_a_vector_with_a_number_that_is_not_finite_is_nan_and_no_other(vectors, bad):
    x = torch.atleast_2d(torch.from_numpy(vectors))
    x[0, ..., -1] = bad
    got = through(INT8, x)
    assert got[0].isnan().all()
    assert got[1:].isfinite().all()


def test_zeros_and_the_largest_are_exact():
    x = torch.tensor([[0.0, -0.0, 0.0], [254.0, -254.0, 2.0]])
    assert torch.equal(through(INT8, x), x)


def test_floats_of_eight_bits_stop_at_their_limit_and_keep_nan():
    x = torch.tensor([500.0, -1e9, 447.0, torch.nan, 0.0])
    got = through(fp8(), x)
    assert got[:2].tolist() == [448, -448]
    assert got.isnan().tolist() == [False, False, False, True, False]


def test_bytes_of_a_vector_are_those_of_its_numbers_and_its_scale():
    sizes = {f.name: f.vector_bytes(128) for f in (as_is(torch.bfloat16), fp8(), INT8)}
    assert sizes == {"auto": 256, "fp8": 128, "int8": 132}


def test_two_parts_of_unlike_size_are_no_vector_for_one_scale():
    """Why int8 is not for latent vectors: with a second part of ten times the size, the first
    loses more than in float8, which has an exponent for each number."""
    x = torch.randn(1000, 576, generator=torch.Generator().manual_seed(0))
    x[:, 512:] *= 10
    errors = [
        ((through(f, x) - x)[:, :512].norm() / x[:, :512].norm()).item() for f in (INT8, fp8())
    ]
    assert errors[0] > 2 * errors[1]


def test_latent_vectors_refuse_a_format_with_one_scale_by_its_name():
    groups = group_layers([CacheSpec(num_kv_heads=1, head_dim=576, latent=True)])
    check_format(TorchOps("cpu"), groups, fp8())
    with pytest.raises(ConfigError, match=r"'int8' is not for .* latent .* kv_cache_dtype='fp8'"):
        check_format(TorchOps("cpu"), groups, INT8)


class Forgetful(Int8):
    """Breaks every promise: it rounds more than it says, moves zero, and hides NaN."""

    def vector_bytes(self, size):
        return size

    def encode(self, x):
        codes, scale = super().encode(x.nan_to_num(0.0))
        return (codes // 16 + 1) * 7, scale

    def decode(self, codes, scale, dtype):
        return super().decode(codes, scale, dtype) + 0.1


def test_the_kit_names_each_promise_that_a_format_breaks():
    said = {}
    for check in kv_format_checks("forgetful", lambda dtype: Forgetful()):
        try:
            check()
        except PluginError as error:
            said[check.claim] = str(error)
    broken = {"error in float32", "error in bfloat16", "size", "keeps zeros", "shows NaN"}
    assert set(said) - {"attention over what it holds"} == broken
    assert "0.008 was promised" in said["error in float32"]
    assert "vector_bytes(16) is not what codes and scale take" in said["size"]
