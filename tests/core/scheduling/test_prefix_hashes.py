"""What identifies a block's content."""

import hashlib
import json
import subprocess
import sys

import cbor2
import numpy as np
import pytest
import xxhash

from pagedcore.errors import ConfigError
from pagedcore.scheduling.hashing import DEFAULT_SEED, BlockHasher

ALGORITHMS = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")
TOKENS = np.array([5, 6, 7, 8], np.int32)


@pytest.fixture(autouse=True)
def _no_seed_from_outside(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_hash_covers_parent_tokens_and_extra(algorithm, caplog):
    """KV-1, KV-5"""
    hasher = BlockHasher(algorithm)
    base = hasher.hash(b"p" * 32, TOKENS, None)
    assert base == hasher.hash(b"p" * 32, TOKENS.copy(), None)
    others = {
        hasher.hash(b"q" * 32, TOKENS, None),
        hasher.hash(b"p" * 32, TOKENS[::-1], None),
        hasher.hash(b"p" * 32, TOKENS, ("salt",)),
        hasher.hash(b"p" * 32, TOKENS, ("tlas",)),
    }
    assert len(others) == 4
    assert base not in others


def test_lengths_keep_parent_and_tokens_apart():
    """KV-4: no two inputs have one serialisation."""
    hasher = BlockHasher("sha256")
    with_parent = hasher.hash(TOKENS[:1].tobytes(), TOKENS[1:], None)
    without = hasher.hash(b"", TOKENS, None)
    assert with_parent != without


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_many_blocks_hash_as_each_of_them_does(algorithm):
    """KV-1"""
    hasher = BlockHasher(algorithm)
    parents = [hasher.first_parent, hasher.hash(hasher.first_parent, TOKENS, None)]
    tokens = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    alone = [hasher.hash(parent, row, None) for parent, row in zip(parents, tokens, strict=True)]
    assert hasher.hash_many(parents, tokens) == alone


def test_sha256_agrees_between_processes():
    """KV-2, KV-4"""
    code = (
        "import json, numpy; from pagedcore.scheduling.hashing import BlockHasher as H;"
        "h = H('sha256'); print(json.dumps("
        "h.hash(h.first_parent, numpy.array([5, 6, 7, 8], numpy.int32), ('s',)).hex()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    hasher = BlockHasher("sha256")
    assert json.loads(run.stdout) == hasher.hash(hasher.first_parent, TOKENS, ("s",)).hex()


def test_cbor_hashes_can_be_computed_elsewhere():
    """KV-2, KV-4: deterministic CBOR of [parent, tokens, extra or null]."""
    hasher = BlockHasher("sha256_cbor")
    parent = hashlib.sha256(cbor2.dumps(DEFAULT_SEED, canonical=True)).digest()
    assert hasher.first_parent == parent
    for extra in (None, ("salt",)):
        content = [parent, [5, 6, 7, 8], None if extra is None else list(extra)]
        encoded = cbor2.dumps(content, canonical=True)
        assert hasher.hash(parent, TOKENS, extra) == hashlib.sha256(encoded).digest()


def test_xxhash_is_xxh3_with_128_bits_big_endian():
    """KV-4"""
    hasher = BlockHasher("xxhash_cbor")
    encoded = cbor2.dumps([b"p", [5, 6, 7, 8], None], canonical=True)
    number = xxhash.xxh3_128_intdigest(encoded)
    assert hasher.hash(b"p", TOKENS, None) == number.to_bytes(16, "big")


def test_the_seed_is_pythonhashseed_where_it_is_a_number(monkeypatch):
    """KV-2"""
    default = BlockHasher("sha256").first_parent
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    assert BlockHasher("sha256").first_parent == default
    monkeypatch.setenv("PYTHONHASHSEED", "12")
    assert BlockHasher("sha256").first_parent != default
    assert BlockHasher("xxhash").first_parent == BlockHasher("xxhash").first_parent


def test_xxhash_without_a_seed_is_random_and_says_so(caplog):
    """KV-2"""
    hashers = [BlockHasher("xxhash") for _ in range(2)]
    assert hashers[0].first_parent != hashers[1].first_parent
    assert "caches cannot be shared" in caplog.text
    assert not hashers[0].is_cryptographic


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ConfigError, match="sha256, sha256_cbor, xxhash, xxhash_cbor, not 'md5'"):
        BlockHasher("md5")


@pytest.mark.parametrize(("algorithm", "library"), [("xxhash", "xxhash"), ("sha256_cbor", "cbor2")])
def test_a_missing_library_is_named(algorithm, library, monkeypatch):
    """CFG-1"""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=f"needs the package '{library}'"):
        BlockHasher(algorithm)
