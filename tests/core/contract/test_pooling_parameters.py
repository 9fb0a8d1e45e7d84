"""What a request for a vector may ask for, of which model."""

import pytest

from pagedcore.errors import RequestError
from pagedcore.pooling import PoolingInfo, PoolingParams

MATRYOSHKA = PoolingInfo(size=64, is_matryoshka=True, dimensions=(16, 32))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"pooling": "max"}, "pooling"),
        ({"pooling": 3}, "pooling"),
        ({"normalize": "yes"}, "normalize"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"dimensions": 1.0}, "dimensions"),
        ({"num_first": -1}, "num_first"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_its_name(fields, name):
    with pytest.raises(RequestError, match=name) as caught:
        PoolingParams(**fields)
    assert caught.value.param == name


def test_what_a_request_leaves_open_is_the_models_own_way():
    model = PoolingInfo(pooling="mean", normalize=False)
    assert PoolingParams().settled(model) == PoolingParams(pooling="mean", normalize=False)
    asked = PoolingParams(pooling="cls", normalize=True)
    assert asked.settled(model) == asked


def test_only_models_that_were_trained_for_it_have_their_vectors_cut():
    """EMB-1"""
    with pytest.raises(RequestError, match="cannot be cut"):
        PoolingParams(dimensions=4).settled(PoolingInfo(size=64))
    with pytest.raises(RequestError, match="one of 16, 32, not 20"):
        PoolingParams(dimensions=20).settled(MATRYOSHKA)
    with pytest.raises(RequestError, match="at most 64, not 65"):
        PoolingParams(dimensions=65).settled(PoolingInfo(size=64, is_matryoshka=True))
    assert PoolingParams(dimensions=16).settled(MATRYOSHKA).dimensions == 16


def test_scores_need_a_classifier_and_are_never_scaled_or_cut():
    ranker = PoolingInfo(num_labels=1, is_matryoshka=True)
    assert PoolingParams(pooling="scores", normalize=True).settled(ranker).normalize is False
    with pytest.raises(RequestError, match="no classifier"):
        PoolingParams(pooling="scores").settled(PoolingInfo())
    with pytest.raises(RequestError, match="cannot be cut"):
        PoolingParams(pooling="scores", dimensions=1).settled(ranker)
