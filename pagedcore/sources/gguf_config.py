"""A GGUF file's metadata as Hugging Face's config.json and generation_config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedcore.errors import ModelError
from pagedcore.sources.gguf_reader import GgufFile


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a GGUF architecture is called by Hugging Face, and how its tensors differ."""

    model_type: str
    class_name: str
    layer_tensors: Mapping[str, str]
    """Names within a layer, from GGUF's `blk.<n>.` to `model.layers.<n>.`."""
    permuted: bool = False
    """Whether rows of Q and K are stored with the two halves of each head interleaved."""


_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_BIASES = {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
_HEAD_NORMS = {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}

ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _LAYER, permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LAYER | _BIASES),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LAYER | _HEAD_NORMS),
}
"""By `general.architecture`. Mistral's models are stored as `llama`, and are read as such."""

MAX_SIZE = 2**31 - 1
MIN_REAL, MAX_REAL = 1e-30, 1e30
"""Beyond any setting of any model, and within what a float32 can hold."""

ROPE_FACTORS = "rope_freqs.weight"
"""Name of the tensor that divides rope frequencies, for the models that scale them as Llama 3."""


class Metadata:
    """Typed access to a file's metadata; what is missing or of another type is a ModelError."""

    def __init__(self, file: GgufFile) -> None:
        self._path = file.path
        self._values = file.metadata

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `key`, or `default` where the file has none."""
        value = self._values.get(key, default)
        if value is not default and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise self.error(f"has a {type(value).__name__} for {key!r}, which stands for another")
        return value

    def require(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of `key`."""
        value = self.get(key, kind)
        if value is None:
            raise self.error(f"lacks the metadata {key!r}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer of 31 bits."""
        value: int = self.require(key, int) if default is None else self.get(key, int, default)
        if not 1 <= value <= MAX_SIZE:
            raise self.error(f"has {value} for {key!r}, which must be 1 to {MAX_SIZE}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number, with the digits that a float32 has."""
        kinds = (float, int)
        value = self.require(key, kinds) if default is None else self.get(key, kinds, default)
        if not MIN_REAL <= value <= MAX_REAL:
            raise self.error(f"has {value} for {key!r}, which must be {MIN_REAL} to {MAX_REAL}")
        return float(str(np.float32(value)))

    def tokens(self) -> list[str]:
        """The vocabulary, in the order of ids."""
        tokens: list[str] = self.require("tokenizer.ggml.tokens", list)
        return tokens

    def token_id(self, role: str) -> int | None:
        """The token that plays a part such as "bos", or None where there is none."""
        token_id: int | None = self.get(f"tokenizer.ggml.{role}_token_id", int)
        if token_id is not None and not 0 <= token_id < len(self.tokens()):
            raise self.error(f"has {token_id} for its {role} token, of {len(self.tokens())} tokens")
        return token_id

    def error(self, offence: str) -> ModelError:
        """An error that begins with the file's path and ends with what to do."""
        return ModelError(
            f"{self._path} {offence}. Take a file made by llama.cpp's convert_hf_to_gguf.py, or "
            "the model's safetensors."
        )


def architecture_of(file: GgufFile) -> Architecture:
    """Raises ModelError for a file that is no whole model of a known architecture."""
    metadata = Metadata(file)
    name = metadata.require("general.architecture", str)
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise metadata.error(f"is of the architecture {name!r}, and those read are {known}")
    if metadata.get("split.count", int, 0) > 1:
        raise ModelError(
            f"{file.path} is one part of several. Join them with `llama-gguf-split --merge`."
        )
    if metadata.get(f"{name}.expert_count", int, 0):
        raise metadata.error("is a mixture of experts, which is not read from GGUF")
    return ARCHITECTURES[name]


def model_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json. Raises ModelError when the metadata does not describe a model."""
    metadata = Metadata(file)
    architecture = architecture_of(file)
    name = metadata.require("general.architecture", str)
    hidden_size = metadata.size(f"{name}.embedding_length")
    num_heads = metadata.size(f"{name}.attention.head_count")
    num_kv_heads = metadata.size(f"{name}.attention.head_count_kv", num_heads)
    head_dim = metadata.size(f"{name}.attention.key_length", max(hidden_size // num_heads, 1))
    context = metadata.size(f"{name}.context_length")
    if num_heads % num_kv_heads:
        raise metadata.error(f"has {num_heads} heads, not a multiple of {num_kv_heads} KV heads")
    for key in ("rope.dimension_count", "attention.value_length"):
        value = metadata.size(f"{name}.{key}", head_dim)
        if value != head_dim or head_dim % 2:
            raise metadata.error(f"has {name}.{key} {value} with heads of {head_dim}")
    if metadata.get(f"{name}.attention.sliding_window", int, 0):
        raise metadata.error("has a sliding window, which is not read from GGUF")
    if "token_embd.weight" not in file.tensors:
        raise metadata.error("lacks the tensor 'token_embd.weight'")
    vocab_size = file.tensors["token_embd.weight"].shape[0]
    if len(metadata.tokens()) > vocab_size:
        raise metadata.error(f"has {len(metadata.tokens())} tokens and {vocab_size} embeddings")
    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": "bfloat16",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": metadata.size(f"{name}.feed_forward_length"),
        "num_hidden_layers": metadata.size(f"{name}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": metadata.real(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.real(f"{name}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    scaling = _rope_scaling(file, metadata, name, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config | _token_ids(metadata)


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The content of generation_config.json: the ids that end a text, and those around it.

    A chat model's turn may end otherwise than its text: both ids end a generation.
    """
    metadata = Metadata(file)
    ids = _token_ids(metadata)
    ends = [ids["eos_token_id"]] if "eos_token_id" in ids else []
    for role in ("eot", "eom"):
        end = metadata.token_id(role)
        if end is not None and end not in ends:
            ends.append(end)
    tokens = metadata.tokens()
    types = metadata.get("tokenizer.ggml.token_type", np.ndarray, np.array([]))
    for turn_end in ("<|eot_id|>", "<|im_end|>"):
        if turn_end in tokens:
            end = tokens.index(turn_end)
            if end not in ends and end < len(types) and types[end] == 3:  # a control token
                ends.append(end)
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return ids


def _token_ids(metadata: Metadata) -> dict[str, Any]:
    roles = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: metadata.token_id(role) for name, role in roles.items()}
    return {name: token_id for name, token_id in found.items() if token_id is not None}


def _rope_scaling(
    file: GgufFile, metadata: Metadata, name: str, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, metadata, name, config)
    kind = metadata.get(f"{name}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": metadata.real(f"{name}.rope.scaling.factor")}
    if kind == "yarn":
        key = f"{name}.rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = metadata.size(key)
        if metadata.real(f"{name}.rope.scaling.attn_factor", 1.0) != 1.0:
            raise metadata.error("scales attention besides rope, which is not read from GGUF")
    elif kind != "linear":
        raise metadata.error(f"has rope scaling {kind!r}, and those read are linear, yarn, llama3")
    return scaling


def _llama3_scaling(
    file: GgufFile, metadata: Metadata, name: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Find the settings behind a table of factors, as Llama 3.1 and its successors have it.

    The file keeps only their result. All published models differ in nothing but the largest
    factor, so the table is made again from that and compared.
    """
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.shape != (config["head_dim"] // 2,):  # before anything is made of that size
        raise metadata.error(f"has {ROPE_FACTORS!r} of shape {tensor.shape}, not one per frequency")
    stored = tensor.type.dequantize(file.rows(tensor)).ravel()
    if not 1 <= stored.max() <= MAX_REAL:  # NaN neither
        raise metadata.error(f"scales rope by a {ROPE_FACTORS!r} that no Llama 3 has")
    scaling = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": metadata.size(
            f"{name}.rope.scaling.original_context_length", 8192
        ),
    }
    expected = llama3_factors(config["head_dim"], config["rope_theta"], scaling)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise metadata.error(f"scales rope by a {ROPE_FACTORS!r} that no Llama 3 has")
    return scaling


def llama3_factors(
    head_dim: int, theta: float, scaling: Mapping[str, Any]
) -> npt.NDArray[np.float64]:
    """What Llama 3.1 divides each rope frequency by, [head_dim / 2].

    Wavelengths above context / low_freq_factor are stretched by `factor`, those below context /
    high_freq_factor stay, and between them the frequency is interpolated.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: npt.NDArray[np.float64] = 1 / ((1 - kept) / scaling["factor"] + kept)
    return factors
