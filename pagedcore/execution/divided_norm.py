"""RMSNorm over something that ranks divide, such as all heads of a token.

T tokens   n elements of this rank
"""

from collections.abc import Callable

from torch import Tensor

from pagedcore.execution.layers import RMSNorm
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.shard import Share


def divided_rms_norm(
    build: ModelBuild, name: str, share: Share, eps: float
) -> Callable[[Tensor], Tensor]:
    """An `RMSNorm` of `share.whole` elements; a rank's maps its own, [T, n] to [T, n]."""
    if build.shard.size == 1:
        return RMSNorm(build, name, share.whole, eps)
    return _DividedRMSNorm(build, name, share, eps)


class _DividedRMSNorm:
    """Adds the squares up over all ranks, in float32."""

    def __init__(self, build: ModelBuild, name: str, share: Share, eps: float) -> None:
        build.weights.divide(name, share)
        self._weight = build.weights.take(f"{name}.weight", (share.whole,), dim=0)
        self._eps = eps
        self._collective = build.shard.collective
        self._num_added = share.own * build.shard.size
        """Elements of all ranks: more than there are, where several have the same."""

    def __call__(self, x: Tensor) -> Tensor:
        """See `divided_rms_norm`."""
        wide = x.float()
        squares = self._collective.all_reduce(wide.square().sum(-1, keepdim=True))
        factor = (squares / self._num_added + self._eps).rsqrt()
        return (wide * factor * self._weight).to(x.dtype)
