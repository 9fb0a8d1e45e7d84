"""Tensor parallelism as a model sees it: which rank it is, and what that rank has of everything.

All ranks run the same step on the same tokens. A matrix is divided by its outputs (heads, the width
of an MLP, the vocabulary) or, behind such a one, by its inputs; then what the ranks return is added
up, so that all go on with equal numbers. `divided.py` does both for every weight format.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, Self

from torch import Tensor

from pagedcore.errors import ConfigError, ModelError

MOST_NAMED = 128
"""The largest number of ranks that an error proposes."""


class Collective(Protocol):
    """What ranks do together; all must call the same, in the same order.

    On a GPU both only queue work on the current stream, so that a step can be captured.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, to the bit the same on each; x may be overwritten."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' x, which have one shape, in the order of the ranks along `dim`."""
        ...


class Alone:
    """The `Collective` of a single rank."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collective.all_reduce`."""
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """See `Collective.all_gather`."""
        return x


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank has of a dimension that holds one or several parts behind each other."""

    sizes: tuple[int, ...]
    """Of the parts."""

    ranges: tuple[range, ...]
    """What the rank has of each part, counted from the part's begin."""

    @classmethod
    def join(cls, shares: Sequence["Share"]) -> Self:
        """Of a dimension that holds others behind each other, as fused matrices do."""
        return cls(
            tuple(size for share in shares for size in share.sizes),
            tuple(part for share in shares for part in share.ranges),
        )

    @property
    def whole(self) -> int:
        """The size of the dimension."""
        return sum(self.sizes)

    @property
    def own(self) -> int:
        """How much of it the rank has."""
        return sum(map(len, self.ranges))

    def times(self, factor: int) -> Self:
        """The same share of something `factor` times as large: of the rows of heads, say."""
        return type(self)(
            tuple(size * factor for size in self.sizes),
            tuple(range(part.start * factor, part.stop * factor) for part in self.ranges),
        )

    def pieces(self, name: str, count: int) -> list[range]:
        """What the rank has of the tensor `name`, which holds the dimension in `count` pieces.

        A piece may be a number, a word of several, a group of inputs with one scale. Raises
        ModelError where the share would begin or end within a piece.
        """
        begins = accumulate(self.sizes[:-1], initial=0)
        found = []
        for begin, part in zip(begins, self.ranges, strict=True):
            ends = [(begin + end) * count for end in (part.start, part.stop)]
            if any(end % self.whole for end in ends):
                raise ModelError(
                    f"{name!r} holds {self.whole} numbers in {count} pieces of "
                    f"{self.whole / count:g}, and a rank would get only a part of one: "
                    f"tensor_parallel_size must be {self._allowed(count)}"
                )
            found.append(range(ends[0] // self.whole, ends[1] // self.whole))
        return found

    def _allowed(self, count: int) -> str:
        """The numbers of ranks between which all parts can be divided."""
        return _one_of(
            n
            for n in range(1, MOST_NAMED + 1)
            if all(size % n == 0 and size // n * count % self.whole == 0 for size in self.sizes)
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `size` ranks that run a model together. The default is a rank that runs it alone."""

    rank: int = 0
    size: int = 1
    collective: Collective = Alone()  # noqa: RUF009  # it has no state

    def __post_init__(self) -> None:
        """Raises ConfigError for a rank that there is not."""
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank must be from 0 to {self.size - 1}, not {self.rank}")

    def even(self, what: str, count: int) -> Share:
        """As much of `count` as all ranks have. Raises ModelError, saying `what`, if it is uneven.

        `what` is plural, such as "the heads of model.layers.0.self_attn".
        """
        each, left = divmod(count, self.size)
        if left:
            raise self._uneven(what, count, lambda n: count % n == 0)
        return Share((count,), (range(self.rank * each, (self.rank + 1) * each),))

    def heads(self, what: str, num_heads: int, num_kv_heads: int) -> tuple[Share, Share]:
        """Query heads and the kv heads that they read; raises ModelError as `even` does.

        With more ranks than kv heads, several ranks have the same one.
        """
        query = self.even(f"the heads of {what}", num_heads)
        if num_kv_heads % self.size == 0:
            return query, self.even(f"the kv heads of {what}", num_kv_heads)
        if self.size % num_kv_heads:
            raise self._uneven(
                f"the kv heads of {what}",
                num_kv_heads,
                lambda n: num_heads % n == 0 and 0 in (num_kv_heads % n, n % num_kv_heads),
            )
        own = self.rank * num_kv_heads // self.size
        return query, Share((num_kv_heads,), (range(own, own + 1),))

    def longest(self, count: int) -> Share:
        """As much as every rank has, but for the last ones, if `count` is uneven: a vocabulary."""
        each = -(-count // self.size)
        begin, end = (min(rank * each, count) for rank in (self.rank, self.rank + 1))
        return Share((count,), (range(begin, end),))

    def all_of(self, count: int) -> Share:
        """Everything: what all ranks have, beside others that they divide."""
        return Share((count,), (range(count),))

    def _uneven(self, what: str, count: int, fits: Callable[[int], bool]) -> ModelError:
        allowed = _one_of(filter(fits, range(1, MOST_NAMED + 1)))
        return ModelError(
            f"{what}, {count}, cannot be divided between {self.size} ranks: "
            f"tensor_parallel_size must be {allowed}"
        )


def cut(whole: Tensor, dim: int, pieces: Sequence[range]) -> Tensor:
    """The pieces of one dimension, behind each other, contiguous and of their own."""
    shape = list(whole.shape)
    shape[dim] = sum(map(len, pieces))
    out = whole.new_empty(shape)
    at = 0
    for piece in () if whole.is_meta else pieces:
        out.narrow(dim, at, len(piece)).copy_(whole.narrow(dim, piece.start, len(piece)))
        at += len(piece)
    return out


def _one_of(counts: Iterable[int]) -> str:
    """Such as "one of 1, 2, 4"."""
    found = list(counts)
    return "1" if found == [1] else f"one of {', '.join(map(str, found))}"
