"""A model of our own: attention and MLP side by side, both behind one norm.

    x = x + attention(norm(x)) + mlp(norm(x))

Everything that makes it fast comes from pagedcore: the paged cache, the kernels, the graphs.
"""

from torch import Tensor

from pagedcore import hookimpl
from pagedcore.execution.config_fields import ConfigFields
from pagedcore.execution.layers import Attention, Embedding, GatedMLP, Head, RMSNorm
from pagedcore.execution.model import ModelBuild
from pagedcore.execution.rope import make_rope
from pagedcore.testing.model_case import SIZES, ModelCase

pagedcore_requires = ">=1,<2"


@hookimpl
def pagedcore_models():
    return {"ParallelForCausalLM": lambda: ParallelForCausalLM}


@hookimpl
def pagedcore_model_cases():
    config = {**SIZES, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    return {"ParallelForCausalLM": ModelCase(family="Parallel", config=config, reference="")}


class ParallelForCausalLM:
    def __init__(self, build: ModelBuild) -> None:
        fields = ConfigFields(build.config)  # which refuses what is missing or no number
        h, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        width, eps = fields.size("intermediate_size"), fields.number("rms_norm_eps")
        kv_heads = fields.size("num_key_value_heads", heads)
        if h % heads or heads % kv_heads or h // heads % 2:
            raise fields.error("hidden_size", f"must fit {heads} heads and {kv_heads} kv heads")
        head_dim = h // heads
        rope = make_rope(
            build.config, head_dim=head_dim, max_positions=build.max_positions, device=build.device
        )
        self.vocab_size = fields.size("vocab_size")
        self.embedding = Embedding(build, "embedding", self.vocab_size, h)
        self.layers = []
        for i in range(fields.num_layers()):
            norm = RMSNorm(build, f"layers.{i}.norm", h, eps)
            attention = Attention(
                build,
                f"layers.{i}.attention",
                h,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                rope=rope,
            )
            mlp = GatedMLP(build, f"layers.{i}.mlp", h, width)
            self.layers.append((norm, attention, mlp))
        self.norm = RMSNorm(build, "norm", h, eps)
        self.head = Head(build, "head", self.vocab_size, h)
        self.cache_specs = [attention.cache_spec for _, attention, _ in self.layers]

    def forward(self, token_ids, batch, caches) -> Tensor:
        x = self.embedding(token_ids)
        for (norm, attention, mlp), cache in zip(self.layers, caches, strict=True):
            normed = norm(x)
            x = x + attention(normed, batch, cache) + mlp(normed)
        return self.norm(x)

    def logits(self, hidden) -> Tensor:
        return self.head(hidden)
