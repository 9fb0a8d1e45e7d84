"""Model architectures, by the names that a checkpoint's config.json gives them.

llama.py      LlamaForCausalLM: Llama 2 and 3, SmolLM2, and whatever else is built like them
mistral.py    MistralForCausalLM: attention over a sliding window
qwen2.py      Qwen2ForCausalLM: biases on queries, keys and values
qwen3.py      Qwen3ForCausalLM: norms on queries and keys
qwen3_moe.py  Qwen3MoeForCausalLM: a mixture of experts in place of the MLP
cases.py      each of them at a size that the model kit checks
decoder.py    what they share: the fields of config.json, and the way through the layers

A family is one file that reads like the diagram of its architecture; the layers are the core's, in
`pagedcore.execution.layers`.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pagedcore

if TYPE_CHECKING:
    from pagedcore.execution.model import Model
    from pagedcore.testing.model_case import ModelCase

pagedcore_requires = ">=1,<2"


@pagedcore.hookimpl
def pagedcore_models() -> Mapping[str, Callable[[], type["Model"]]]:
    """See `pagedcore.hookspecs`."""
    return {
        "LlamaForCausalLM": _llama,
        "MistralForCausalLM": _mistral,
        "Qwen2ForCausalLM": _qwen2,
        "Qwen3ForCausalLM": _qwen3,
        "Qwen3MoeForCausalLM": _qwen3_moe,
    }


@pagedcore.hookimpl
def pagedcore_model_cases() -> Mapping[str, "ModelCase"]:
    """See `pagedcore.hookspecs`."""
    from pagedcore_models.cases import CASES

    return CASES


def _llama() -> type["Model"]:
    from pagedcore_models.llama import LlamaForCausalLM

    return LlamaForCausalLM


def _mistral() -> type["Model"]:
    from pagedcore_models.mistral import MistralForCausalLM

    return MistralForCausalLM


def _qwen2() -> type["Model"]:
    from pagedcore_models.qwen2 import Qwen2ForCausalLM

    return Qwen2ForCausalLM


def _qwen3() -> type["Model"]:
    from pagedcore_models.qwen3 import Qwen3ForCausalLM

    return Qwen3ForCausalLM


def _qwen3_moe() -> type["Model"]:
    from pagedcore_models.qwen3_moe import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM
