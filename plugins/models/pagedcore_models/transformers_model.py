"""The last resort: models that nobody wrote for pagedcore run through transformers' modeling code.

    T tokens   S sequences   h hidden size   V vocabulary

A step's tokens are one sequence [1, T] to transformers, with the positions that they really have.
Only attention looks at other tokens, and that is ours: see `transformers_attention`. A model that
needs anything else of it, or remembers the past in another way, is refused by name: see
`transformers_skeleton`. No code of a model's folder is run.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.model import ModelBuild, Weights
from pagedcore.execution.ops import LayerCache, StepBatch
from pagedcore_models.transformers_attention import IMPLEMENTATION, PagedLayer, Step
from pagedcore_models.transformers_skeleton import look_at, make_config, part, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


class TransformersModel:
    """A `pagedcore.execution.model.Model` around a causal language model of transformers."""

    supports_graphs = False
    """Modeling code may read on the host, so no step is captured."""

    supports_shards = False
    """Modeling code has all heads."""

    def __init__(self, build: ModelBuild) -> None:
        """See `Model`. Raises ModelError, naming architecture and reason, for what cannot run."""
        name = str(build.config["architectures"][0])
        if build.quantizer.name != "none":
            raise refusal(name, "its weights cannot be quantized there")
        config = make_config(build.config)
        skeleton = look_at(config, name, build.dtype)
        self.vocab_size = skeleton.vocab_size
        self.cache_specs: Sequence[CacheSpec | None] = [
            call.cache_spec for call in skeleton.calls.values()
        ]
        for module in skeleton.calls:  # masks and frequencies that old checkpoints hold
            for buffer in ("bias", "masked_bias", "rotary_emb."):
                build.weights.ignore(f"{module}.{buffer}")
        tensors = _take(build.weights, skeleton.model)
        model = skeleton.model
        if build.device.type != "meta":
            model = _fill(model, config, tensors, build)
            logger.warning(
                "%s runs through transformers' modeling code: correct, but slower than what is "
                "written for pagedcore",
                name,
            )
        self._step = Step()
        for index, (module, call) in enumerate(skeleton.calls.items()):
            paged: Any = PagedLayer(build.ops, call, index, self._step)
            model.get_submodule(module).paged = paged
        self._layers = part(model, skeleton.outputs)
        self._head: Any = model

    def forward(
        self, token_ids: Tensor, batch: StepBatch, caches: Sequence[LayerCache | None]
    ) -> Tensor:
        """See `Model.forward`."""
        self._step.batch, self._step.caches = batch, caches
        positions = batch.positions[None]
        out = self._layers(input_ids=token_ids[None], position_ids=positions, use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        scores: Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return scores


def _take(weights: Weights, model: "PreTrainedModel") -> dict[str, Tensor]:
    """All tensors of a model, by the names and in the shapes that checkpoints have them in.

    These may be others than the model's: checkpoints have experts one by one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = {
        target
        for target, source in model.all_tied_weights_keys.items()
        if weights.has(source) or not weights.has(target)
    }
    wanted = {name: t for name, t in model.state_dict().items() if name not in tied}
    wanted = dict(revert_weight_conversion(model, wanted))
    for name in tied:  # a tied head may be there nevertheless
        if weights.has(name):
            wanted[name] = model.state_dict()[name]
    return {
        name: weights.take(name, t.shape, dtype=None if t.is_floating_point() else t.dtype)
        for name, t in wanted.items()
    }


def _fill(
    skeleton: "PreTrainedModel",
    config: "PreTrainedConfig",
    tensors: dict[str, Tensor],
    build: ModelBuild,
) -> "PreTrainedModel":
    """The model with its weights, on its device; `tensors` is given up.

    transformers places them in the host's memory, so both may hold them, but the device only once.
    """
    kind: Any = type(skeleton)
    with _without_progress():
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            attn_implementation=IMPLEMENTATION,
            dtype=build.dtype,
            output_loading_info=True,
        )
    lost = set(found["missing_keys"]) - skeleton.all_tied_weights_keys.keys()
    lost |= set(found["unexpected_keys"]) | set(found["mismatched_keys"])
    if lost or found["error_msgs"]:  # else they would be random numbers
        raise refusal(kind.__name__, f"its weights cannot be mapped: {', '.join(sorted(lost))}")
    tensors.clear()
    placed: PreTrainedModel = model.to(build.device)
    return placed


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    """No bars of transformers meanwhile."""
    from transformers.utils import logging as of_transformers

    bars: Any = of_transformers
    had_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            bars.enable_progress_bar()
