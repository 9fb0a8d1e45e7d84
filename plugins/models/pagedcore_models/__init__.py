"""Model architectures, by the names that a checkpoint's config.json gives them.

llama.py           LlamaForCausalLM: Llama 2 and 3, SmolLM2, and whatever else is built like them
mistral.py         MistralForCausalLM: attention over a sliding window
qwen2.py           Qwen2ForCausalLM: biases on queries, keys and values
qwen3.py           Qwen3ForCausalLM: norms on queries and keys
qwen3_moe.py       Qwen3MoeForCausalLM: a mixture of experts in place of the MLP
gemma2.py          Gemma2ForCausalLM: norms on both sides, capped scores, windows
gemma3.py          Gemma3ForCausalLM, and Gemma3ForConditionalGeneration's text: two rotary bases
mixtral.py         MixtralForCausalLM: a mixture of experts in a Mistral
qwen2_moe.py       Qwen2MoeForCausalLM: a mixture of experts, and one that all tokens take
phi3.py            Phi3ForCausalLM: Phi-3 and Phi-4, fused weights
granite.py         GraniteForCausalLM: multipliers
olmo2.py           Olmo2ForCausalLM: norms behind each part
smollm3.py         SmolLM3ForCausalLM: layers without positions
cohere.py          CohereForCausalLM, Cohere2ForCausalLM: attention and MLP side by side
glm.py             GlmForCausalLM, Glm4ForCausalLM: half of each head turns; norms on both sides
starcoder2.py      Starcoder2ForCausalLM: LayerNorms, biases, a plain MLP
deepseek.py        DeepseekV2ForCausalLM, DeepseekV3ForCausalLM: latent attention, shared experts
gpt2.py            GPT2LMHeadModel: learned positions
gpt_oss.py         GptOssForCausalLM: sinks in attention, windows, clamped experts
opt.py             OPTForCausalLM: learned positions, norms before or behind
bert.py            BertModel, XLMRobertaModel, RobertaModel, and each with a classifier
modernbert.py      ModernBertModel, and the same with a classifier
encoder.py         what these share
transformers_*.py  all others that transformers has: its modeling code over our cache
cases.py           each of them at a size that the model kit checks; encoder_cases.py the encoders
plain_decoder.py   the way through the layers of models with LayerNorms
decoder.py         what they share: the fields of config.json, and the way through the layers

A family is one file that reads like the diagram of its architecture; the layers are the core's, in
`pagedcore.execution.layers`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pagedcore

if TYPE_CHECKING:
    from pagedcore.execution.model import Model
    from pagedcore.testing.model_case import ModelCase

pagedcore_requires = ">=1,<2"

MODULES = {
    "Cohere2ForCausalLM": "cohere",
    "CohereForCausalLM": "cohere",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "GPT2LMHeadModel": "gpt2",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Glm4ForCausalLM": "glm",
    "GlmForCausalLM": "glm",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "OPTForCausalLM": "opt",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "SmolLM3ForCausalLM": "smollm3",
    "Starcoder2ForCausalLM": "starcoder2",
}
"""The module of each architecture, which is imported when the architecture is asked for."""

ENCODERS = {
    "BertForSequenceClassification": "bert",
    "BertModel": "bert",
    "ModernBertForSequenceClassification": "modernbert",
    "ModernBertModel": "modernbert",
    "RobertaForSequenceClassification": "bert",
    "RobertaModel": "bert",
    "XLMRobertaForSequenceClassification": "bert",
    "XLMRobertaModel": "bert",
}
"""The same for models that make vectors or scores and no text."""


@pagedcore.hookimpl
def pagedcore_models() -> Mapping[str, Callable[..., type["Model"] | None]]:
    """See `pagedcore.hookspecs`."""
    known = {name: partial(_load, module, name) for name, module in (MODULES | ENCODERS).items()}
    return {**known, "*": _last_resort}


@pagedcore.hookimpl
def pagedcore_model_cases() -> Mapping[str, "ModelCase"]:
    """See `pagedcore.hookspecs`."""
    from pagedcore_models.cases import CASES

    return CASES


def _load(module: str, name: str) -> type["Model"]:
    loaded: type[Model] = getattr(import_module(f"pagedcore_models.{module}"), name)
    return loaded


def _last_resort(config: Mapping[str, Any]) -> type["Model"] | None:
    from pagedcore_models.transformers_skeleton import knows

    return _load("transformers_model", "TransformersModel") if knows(config) else None
