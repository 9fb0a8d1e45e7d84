"""What identifies the content of a full block: a chain of hashes (semantics KV-1 to KV-5)."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedcore.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_SEED = "pagedcore-prefix-v1"
"""Equal in all processes, so that their hashes agree (KV-2)."""

Extra = tuple[Any, ...] | None
Digest = Callable[[bytes], bytes]
Packer = Callable[[bytes, Any, Extra], bytes]


class BlockHasher:
    """Computes `h_i = H(h_(i-1), tokens_i, extra_i)` with one of the algorithms of KV-4.

    Raises ConfigError when the algorithm's library is not installed.
    """

    def __init__(self, algorithm: str) -> None:
        check_algorithm(algorithm)
        self.is_cryptographic = algorithm.startswith("sha256")
        """Otherwise a hit must compare the tokens as well (KV-13)."""
        self._digest, self._pack, pack_seed = _ALGORITHMS[algorithm]()
        self.first_parent = self._digest(pack_seed(self._seed()))
        """The parent of block 0 (KV-2)."""

    def hash(self, parent: bytes, tokens: NDArray[np.int32], extra: Extra) -> bytes:
        """Hash a full block: its tokens int32 [B], after the block with hash `parent`."""
        return self._digest(self._pack(parent, tokens, extra))

    def hash_many(self, parents: Sequence[bytes], tokens: NDArray[np.int32]) -> list[bytes]:
        """Hash one block each, tokens int32 [K, B], after the blocks with hashes `parents` [K]."""
        pack, digest = self._pack, self._digest
        if pack is not _pack_raw or digest is not _sha256:
            rows = zip(parents, tokens, strict=True)
            return [digest(pack(parent, row, None)) for parent, row in rows]
        data, size, sha256 = tokens.astype("<i4").tobytes(), 4 * tokens.shape[1], hashlib.sha256
        head = _head(len(self.first_parent), size)  # the same for all: every parent is a hash
        starts = range(0, len(data), size)
        return [
            sha256(head + parent + data[start : start + size]).digest()
            for parent, start in zip(parents, starts, strict=True)
        ]

    def _seed(self) -> str:
        chosen = os.environ.get("PYTHONHASHSEED", "random")
        if chosen not in ("", "random"):
            return chosen
        if self.is_cryptographic:
            return DEFAULT_SEED
        logger.warning(
            "block hashes are random in each process: caches cannot be shared. Set PYTHONHASHSEED, "
            "or use --prefix-caching-hash-algo sha256"
        )
        return os.urandom(32).hex()


def check_algorithm(algorithm: str) -> None:
    """Raise ConfigError for an unknown algorithm, or one whose library is not installed."""
    if algorithm not in _ALGORITHMS:
        raise ConfigError(
            f"prefix_caching_hash_algo must be one of {', '.join(_ALGORITHMS)}, not {algorithm!r}"
        )
    _ALGORITHMS[algorithm]()


def _pack_raw(parent: bytes, tokens: Any, extra: Extra) -> bytes:
    """Our own serialisation: lengths stand in front, so no two inputs look alike."""
    data = np.asarray(tokens, "<i4").tobytes()
    tail = repr(extra).encode() if extra else b""
    return _head(len(parent), len(data)) + parent + data + tail


def _head(parent_size: int, data_size: int) -> bytes:
    return b"%d,%d;" % (parent_size, data_size)


def _cbor() -> tuple[Packer, Callable[[str], bytes]]:
    """RFC 8949, section 4.2: deterministic encoding."""
    dumps = _library("cbor2").dumps

    def pack(parent: bytes, tokens: Any, extra: Extra) -> bytes:
        content = [parent, np.asarray(tokens).tolist(), list(extra) if extra else None]
        return bytes(dumps(content, canonical=True))

    def pack_seed(seed: str) -> bytes:
        return bytes(dumps(seed, canonical=True))

    return pack, pack_seed


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _xxh3() -> Digest:
    digest: Digest = _library("xxhash").xxh3_128_digest  # big-endian
    return digest


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"prefix_caching_hash_algo needs the package {name!r}: pip install pagedcore[hash]"
        ) from error


_ALGORITHMS: dict[str, Callable[[], tuple[Digest, Packer, Callable[[str], bytes]]]] = {
    "sha256": lambda: (_sha256, _pack_raw, str.encode),
    "sha256_cbor": lambda: (_sha256, *_cbor()),
    "xxhash": lambda: (_xxh3(), _pack_raw, str.encode),
    "xxhash_cbor": lambda: (_xxh3(), *_cbor()),
}
