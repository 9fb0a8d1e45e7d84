"""What can be known of a model of transformers without its weights, and whether it can run here.

    T tokens   S sequences   h hidden size   V vocabulary

A skeleton is the model on the device "meta", where a run computes shapes only: it shows what each
layer asks of attention, and that the layers and the head can be run apart from each other.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pagedcore.errors import ModelError
from pagedcore.execution.config_fields import ConfigFields
from pagedcore_models.transformers_attention import (
    IMPLEMENTATION,
    Call,
    Recorder,
    UnsupportedAttentionError,
    register,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MOST_LAYERS = 1024
"""Layers are built one by one before a tensor is looked for, so a config that lies costs time."""

LAYER_TYPES = {"full_attention", "sliding_attention"}

BATCH_ROPES = ("dynamic", "longrope")
"""Rotations that depend on the longest sequence of a batch."""

DROPPED = ("architectures", "auto_map", "quantization_config", "dtype", "torch_dtype")
"""Fields of config.json that say how transformers would load; ours is another way."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model without weights."""

    model: "PreTrainedModel"
    calls: Mapping[str, Call]
    """What attention modules ask for, by their names, in the order of the layers."""
    outputs: type
    """What the layers return, which the head is given."""
    vocab_size: int


class Given(nn.Module):
    """Stands where the layers were, and returns what it is given: so the head runs alone."""

    def __init__(self, outputs: type) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, *args: object, inputs_embeds: Tensor, **options: object) -> Any:
        """Hidden states [1, S, h] as what the layers return."""
        return self._outputs(last_hidden_state=inputs_embeds)


def knows(config: Mapping[str, Any]) -> bool:
    """Whether transformers is installed, and has the architecture as a causal language model."""
    if find_spec("transformers") is None:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    return found is not None and found == _name(config)


def make_config(values: Mapping[str, Any]) -> "PreTrainedConfig":
    """The config of transformers for a config.json. Raises ModelError for what it refuses."""
    from transformers import AutoConfig

    fields = ConfigFields(values)
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if fields.has(name) and fields.size(name) > MOST_LAYERS:
            raise fields.error(name, f"must be at most {MOST_LAYERS}")
    kept = {
        name: value
        for name, value in values.items()
        if name not in DROPPED and "implementation" not in name
    }
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**kept)
    except Exception as error:  # of many kinds: each config class checks in its own way
        raise ModelError(f"config.json: transformers refuses it: {error}") from error
    return config


def look_at(config: "PreTrainedConfig", name: str, dtype: torch.dtype) -> Skeleton:
    """Build the architecture `name` without weights.

    Raises ModelError, naming it and the reason, where it cannot run over a paged cache.
    """
    import transformers

    register()
    classes: Any = transformers.AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: PreTrainedModel = classes.from_config(
                copy.deepcopy(config),
                attn_implementation=IMPLEMENTATION,
                experts_implementation="batched_mm",  # whose shapes do not depend on the router
                dtype=dtype,
            ).eval()
    except Exception as error:  # of many kinds: sizes that do not fit, or our attention
        raise refusal(name, f"transformers cannot build it: {error}") from error
    reason = _reason_against(model)
    if reason is not None:
        raise refusal(name, reason)
    names = {module: module_name for module_name, module in model.named_modules()}
    recorder = Recorder()
    for module in names:
        module.paged = recorder  # on each: which of them attend is to be seen
    layers = getattr(model, model.base_model_prefix)
    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        out = layers(input_ids=ids, position_ids=ids, use_cache=False)
        part(model, type(out))
        scores = model(inputs_embeds=out.last_hidden_state, use_cache=False).logits
    except UnsupportedAttentionError as error:
        raise refusal(name, str(error)) from error
    except Exception as error:  # whatever modeling code raises where it reads or does not fit
        raise refusal(name, f"a trial without weights fails: {error}") from error
    setattr(model, model.base_model_prefix, layers)
    calls = {names[module]: call for module, call in recorder.calls.items()}
    reason = _reason_against_calls(model, list(calls.values()))
    if reason is not None:
        raise refusal(name, reason)
    return Skeleton(model, calls, type(out), scores.shape[-1])


def part(model: "PreTrainedModel", outputs: type) -> nn.Module:
    """Take the layers, which return `outputs`, out of a model, which is its head then."""
    layers: nn.Module = getattr(model, model.base_model_prefix)
    setattr(model, model.base_model_prefix, Given(outputs))
    return layers


def refusal(name: str, reason: str) -> ModelError:
    """What to raise about an architecture."""
    return ModelError(
        f"{name} cannot run through transformers' modeling code: {reason}. It needs a plugin of "
        "its own: see docs/plugins.md."
    )


def _name(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _reason_against(model: "PreTrainedModel") -> str | None:
    """Why an architecture cannot run, as far as it says so itself."""
    config = model.config.get_text_config()
    layers = getattr(model, model.base_model_prefix, model)
    if not model._supports_attention_backend:
        return "its attention cannot be replaced"
    convolves = any(isinstance(module, nn.Conv1d) for module in model.modules())
    if model._is_stateful or config.is_encoder_decoder or convolves:
        return "it remembers more of the past than keys and values"
    if layers is model or "position_ids" not in inspect.signature(layers.forward).parameters:
        return "it cannot be told the positions of its tokens"
    others = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if others:
        return f"it has layers of the type {', '.join(sorted(others))}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if any(kind.get("rope_type") in BATCH_ROPES for kind in kinds):
        return "its rotation depends on the longest sequence of a batch"
    return None


def _reason_against_calls(model: "PreTrainedModel", calls: Sequence[Call]) -> str | None:
    """Why an architecture cannot run, by what its layers ask for."""
    config = model.config.get_text_config()
    if len(calls) != config.num_hidden_layers:
        return "not every layer attends through transformers' interface"
    types = getattr(config, "layer_types", None)
    has_window = [call.window is not None for call in calls]
    if types is None:
        is_right = any(has_window) or getattr(config, "sliding_window", None) is None
    else:
        is_right = has_window == [kind == "sliding_attention" for kind in types]
    return None if is_right else "its windows are not those that its config.json states"
