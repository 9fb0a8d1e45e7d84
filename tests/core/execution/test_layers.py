"""What layers promise beyond their sums: shapes before weights, nothing read on the host."""

import json
import subprocess
import sys

import pytest
import torch

import pagedcore_models
from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.kv_formats import as_is
from pagedcore.execution.layers import Embedding, Head, RMSNorm
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.ops import LayerCache, StepBatch
from pagedcore.execution.quantizer import Unquantized
from pagedcore.execution.random_weights import RandomWeights
from pagedcore.execution.renamed_weights import RenamedWeights
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.tiny_models import tiny_config

META = torch.device("meta")

FAMILIES = [
    *("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Gemma2", "Gemma3"),
    *("Granite", "Olmo2", "Phi3", "SmolLM3", "Cohere", "Cohere2", "Glm", "Glm4", "Starcoder2"),
    "OPT",
]
CONFIGS = {
    architecture: pagedcore_models.pagedcore_model_cases()[architecture].config
    for architecture in [*(f"{family}ForCausalLM" for family in FAMILIES), "GPT2LMHeadModel"]
}


class ShapeOps(TorchOps):
    """Operations on shapes alone: whatever reads a tensor on the host fails.

    It counts its calls, by name.
    """

    def __init__(self):
        super().__init__("meta")
        self.calls = []

    def __getattribute__(self, name):
        if name in ("linear", "rms_norm", "add_rms_norm", "silu_mul", "gelu_mul", "pack_linear"):
            self.calls.append(name)
        return super().__getattribute__(name)

    def rope_and_cache(self, qkv, num_heads, rope, norm, cache, batch):
        self.calls.append("rope_and_cache")
        assert qkv.shape[1] == (num_heads + 2 * cache.spec.num_kv_heads) * cache.spec.head_dim
        assert rope is None or rope.cos_sin.shape[1] <= cache.spec.head_dim

    def attention(self, qkv, num_heads, scale, cache, batch, soft_cap=None, sinks=None):
        self.calls.append("attention")
        return qkv[:, : num_heads * cache.spec.head_dim].contiguous()

    def moe(self, x, weights, chosen, experts):
        self.calls.append("moe")
        return torch.empty_like(x)


def build_of(ops, config=None, weights=None, device=META):
    return ModelBuild(
        config=config or {},
        weights=weights or RandomWeights(torch.float32, device, seed=0),
        quantizer=Unquantized(),
        ops=ops,
        dtype=torch.float32,
        device=device,
        max_positions=64,
    )


@pytest.fixture(params=CONFIGS)
def on_meta(request):
    """A family's model without weights, and the operations that it was made with."""
    config = json.loads(tiny_config(CONFIGS[request.param]).to_json_string(use_diff=False))
    ops = ShapeOps()
    model = pagedcore_models.pagedcore_models()[request.param]()(build_of(ops, config))
    return model, ops


def test_making_a_model_of_shapes_calls_no_operation(on_meta):
    _, ops = on_meta
    assert ops.calls == []


LOOK_AT_SHAPES = """
import json, sys
import torch
import pagedcore_models
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.quantizer import Unquantized
from pagedcore.execution.random_weights import RandomWeights
from pagedcore.execution.torch_ops import TorchOps

meta = torch.device("meta")
for architecture, config in json.load(sys.stdin).items():
    build = ModelBuild(
        config=config, weights=RandomWeights(torch.float32, meta, 0), quantizer=Unquantized(),
        ops=TorchOps("cpu"), dtype=torch.float32, device=meta, max_positions=64,
    )
    pagedcore_models.pagedcore_models()[architecture]()(build)
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_looking_at_shapes_does_not_load_a_compiler():
    """Some operations on meta make torch import its compiler: seconds of every start."""
    configs = {name: tiny_config(config).to_dict() for name, config in CONFIGS.items()}
    result = subprocess.run(
        [sys.executable, "-c", LOOK_AT_SHAPES],
        input=json.dumps(configs),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def run_a_step(model):
    """One sequence of one token, and two of three: what comes out has the right shapes."""

    def empty(*shape):
        return torch.empty(shape, dtype=torch.int32, device="meta")

    batch = StepBatch(
        positions=empty(7),
        rows=empty(3),
        query_start=empty(4),
        context_len=empty(3),
        block_tables=empty(1, 3, 8),
        slots=empty(1, 7),
        num_single=1,
        max_query_len=5,
        max_context_len=9,
    )
    nothing = empty(0)
    kept = as_is(torch.float32)
    caches = [LayerCache(spec, 0, 16, kept, nothing, nothing) for spec in model.cache_specs]
    hidden = model.forward(empty(7), batch, caches)
    assert hidden.shape == (7, 64)
    assert model.logits(hidden).shape == (7, model.vocab_size)


def test_a_step_reads_nothing_on_the_host(on_meta):
    """A tensor on meta has no content: `item`, `tolist` and the like would fail."""
    model, ops = on_meta
    run_a_step(model)
    assert ops.calls.count("attention") == len(model.cache_specs)


def test_a_step_of_a_plain_family_is_no_operation_more_than_it_was():
    """What other families need costs Llama nothing."""
    ops = ShapeOps()
    config = json.loads(tiny_config("llama").to_json_string(use_diff=False))
    model = pagedcore_models.pagedcore_models()["LlamaForCausalLM"]()(build_of(ops, config))
    run_a_step(model)
    calls = {name: ops.calls.count(name) for name in set(ops.calls)}
    of_layers = {"linear": 4, "add_rms_norm": 2, "silu_mul": 1, "rope_and_cache": 1, "attention": 1}
    expected = {name: 3 * count for name, count in of_layers.items()}
    expected["linear"] += 1  # the head
    expected["rms_norm"] = 1 + expected["add_rms_norm"]  # which the plain torch of one calls
    assert calls == expected


class Named:
    """Weights from a dict."""

    def __init__(self, **tensors):
        self.tensors = {name.replace("_", "."): tensor for name, tensor in tensors.items()}
        self.taken = []
        self.ignored = []

    def has(self, name):
        return name in self.tensors

    def take(self, name, shape, *, dtype=None, dim=None):
        assert self.tensors[name].shape == tuple(shape)
        self.taken.append((name, dim))
        return self.tensors[name].clone()

    def ignore(self, prefix):
        self.ignored.append(prefix)


def head_over(weights):
    build = build_of(TorchOps("cpu"), weights=weights, device=torch.device("cpu"))
    embedding = Embedding(build, "embed", 5, 3)
    return embedding, Head(build, "head", 5, 3, embedding)


def test_a_tied_head_is_the_embedding():
    embedding, head = head_over(Named(embed_weight=torch.randn(5, 3)))
    x = torch.randn(2, 3)
    assert torch.equal(head(x), x @ embedding.weight.T)


def test_a_tied_head_that_the_checkpoint_holds_nevertheless_is_dropped_if_it_is_equal():
    weight = torch.randn(5, 3)
    embedding, head = head_over(Named(embed_weight=weight, head_weight=weight))
    embedding.weight.zero_()
    assert torch.equal(head(torch.randn(2, 3)), torch.zeros(2, 5))


def test_a_tied_head_that_differs_is_believed():
    own = torch.randn(5, 3)
    _, head = head_over(Named(embed_weight=torch.randn(5, 3), head_weight=own))
    x = torch.randn(2, 3)
    assert torch.equal(head(x), x @ own.T)


def test_a_norm_may_store_its_difference_from_one():
    build = build_of(
        TorchOps("cpu"), weights=Named(n_weight=torch.zeros(4)), device=torch.device("cpu")
    )
    x = torch.tensor([[2.0, 2.0, -2.0, 2.0]])
    assert torch.allclose(RMSNorm(build, "n", 4, 1e-6, offset=1.0)(x), x / 2)
    assert torch.equal(RMSNorm(build, "n", 4, 1e-6)(x), torch.zeros(1, 4))


def test_a_norm_that_stores_its_difference_keeps_the_bits_that_16_have_not():
    """1 + 0.001 is 1 in bfloat16."""
    weight = torch.full((4,), 0.001).bfloat16()
    build = build_of(TorchOps("cpu"), weights=Named(n_weight=weight), device=torch.device("cpu"))
    x = torch.tensor([[2.0, 2.0, -2.0, 2.0]])
    expected = x / 2 * (1 + weight.float())
    torch.testing.assert_close(
        RMSNorm(build, "n", 4, 1e-12, offset=1.0)(x), expected, rtol=0, atol=1e-6
    )


def test_names_between_dots_may_be_others_in_the_checkpoint():
    stored = Named(a_w1_weight=torch.ones(2, 2))
    weights = RenamedWeights(stored, {"gate": "w1", "model": "language.model"})
    assert weights.has("a.gate.weight")
    assert not weights.has("a.w2.weight")
    assert torch.equal(weights.take("a.gate.weight", (2, 2), dim=0), torch.ones(2, 2))
    assert stored.taken == [("a.w1.weight", 0)]
    weights.ignore("model.gate.")
    assert stored.ignored == ["language.model.w1."]


class Asked(RandomWeights):
    """Remembers which dimension each matrix may be divided in."""

    def __init__(self):
        super().__init__(torch.float32, META, seed=0)
        self.dims = {}

    def take(self, name, shape, *, dtype=None, dim=None):
        self.dims[name.removeprefix("model.layers.0.")] = dim
        return super().take(name, shape, dtype=dtype, dim=dim)


def test_every_matrix_says_what_tensor_parallelism_divides():
    config = json.loads(tiny_config("llama", attention_bias=True).to_json_string(use_diff=False))
    weights = Asked()
    model_class = pagedcore_models.pagedcore_models()["LlamaForCausalLM"]()
    model = model_class(build_of(ShapeOps(), config, weights))
    assert model.cache_specs[0] == CacheSpec(num_kv_heads=2, head_dim=16)
    divided = {name: dim for name, dim in weights.dims.items() if not name.startswith("model")}
    assert divided == {
        "self_attn.q_proj.weight": 0,
        "self_attn.k_proj.weight": 0,
        "self_attn.v_proj.weight": 0,
        "self_attn.q_proj.bias": 0,
        "self_attn.k_proj.bias": 0,
        "self_attn.v_proj.bias": 0,
        "self_attn.o_proj.weight": 1,
        "self_attn.o_proj.bias": None,
        "mlp.gate_proj.weight": 0,
        "mlp.up_proj.weight": 0,
        "mlp.down_proj.weight": 1,
        "input_layernorm.weight": None,
        "post_attention_layernorm.weight": None,
        "lm_head.weight": 0,
    }
