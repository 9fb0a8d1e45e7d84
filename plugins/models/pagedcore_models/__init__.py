"""Model architectures, by the names that a checkpoint's config.json gives them.

llama.py           LlamaForCausalLM: Llama 2 and 3, SmolLM2, and whatever else is built like them
mistral.py         MistralForCausalLM: attention over a sliding window
qwen2.py           Qwen2ForCausalLM: biases on queries, keys and values
qwen3.py           Qwen3ForCausalLM: norms on queries and keys
qwen3_moe.py       Qwen3MoeForCausalLM: a mixture of experts in place of the MLP
cohere.py          CohereForCausalLM, Cohere2ForCausalLM: attention and MLP side by side
glm.py             GlmForCausalLM, Glm4ForCausalLM: half of each head turns; norms on both sides
starcoder2.py      Starcoder2ForCausalLM: LayerNorms, biases, a plain MLP
gpt2.py            GPT2LMHeadModel: learned positions
opt.py             OPTForCausalLM: learned positions, norms before or behind
cases.py           each of them at a size that the model kit checks
plain_decoder.py   the way through the layers of models with LayerNorms
decoder.py         what they share: the fields of config.json, and the way through the layers

A family is one file that reads like the diagram of its architecture; the layers are the core's, in
`pagedcore.execution.layers`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

import pagedcore

if TYPE_CHECKING:
    from pagedcore.execution.model import Model
    from pagedcore.testing.model_case import ModelCase

pagedcore_requires = ">=1,<2"

MODULES = {
    "Cohere2ForCausalLM": "cohere",
    "CohereForCausalLM": "cohere",
    "GPT2LMHeadModel": "gpt2",
    "Glm4ForCausalLM": "glm",
    "GlmForCausalLM": "glm",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "OPTForCausalLM": "opt",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Starcoder2ForCausalLM": "starcoder2",
}
"""The module of each architecture, which is imported when the architecture is asked for."""


@pagedcore.hookimpl
def pagedcore_models() -> Mapping[str, Callable[[], type["Model"]]]:
    """See `pagedcore.hookspecs`."""
    return {name: partial(_load, module, name) for name, module in MODULES.items()}


@pagedcore.hookimpl
def pagedcore_model_cases() -> Mapping[str, "ModelCase"]:
    """See `pagedcore.hookspecs`."""
    from pagedcore_models.cases import CASES

    return CASES


def _load(module: str, name: str) -> type["Model"]:
    loaded: type[Model] = getattr(import_module(f"pagedcore_models.{module}"), name)
    return loaded
