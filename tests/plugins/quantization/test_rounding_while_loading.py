"""`--quantization fp8` of a checkpoint that is not quantized."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from pagedcore.execution.checkpoint import Checkpoint
from pagedcore.execution.quantized import FLOAT8, Quantized
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.tiny_models import save_tiny_model
from pagedcore_quantization import pagedcore_quantizers

OPS = TorchOps("cpu")


def rounded(weight):
    found = OPS.quantize(weight)
    return found.values.float() * found.scale


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_tokens_are_those_of_the_rounded_weights(family, tmp_path, tokens):
    save_tiny_model(tmp_path, family)
    in_8_bits = tokens(tmp_path, quantization="fp8")
    in_full = tokens(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    changed = {n: rounded(w) if n.endswith("_proj.weight") else w for n, w in stored.items()}
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert in_8_bits == tokens(tmp_path)
    assert in_8_bits != in_full


def test_a_tied_head_keeps_its_type(tmp_path, tokens):
    save_tiny_model(tmp_path, tie_word_embeddings=True)
    assert [len(t) for t in tokens(tmp_path, quantization="fp8")] == [12, 12, 12]


def test_random_weights_are_rounded_too(tmp_path, tokens):
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    in_8_bits = tokens(tmp_path, quantization="fp8", load_format="dummy")
    assert in_8_bits != tokens(tmp_path, load_format="dummy")


class WatchedWeights:
    """Weights that count how many of their matrices are alive."""

    def __init__(self, weights):
        self._weights = weights
        self._alive = 0
        self.most = 0

    def take(self, name, shape, **options):
        import weakref

        tensor = self._weights.take(name, shape, **options)
        self._alive += 1
        self.most = max(self.most, self._alive)
        weakref.finalize(tensor, self._end)
        return tensor

    def _end(self):
        self._alive -= 1


def make_linear(folder, names, columns, rows):
    checkpoint = Checkpoint(folder)
    weights = WatchedWeights(checkpoint.tensors(torch.float32, torch.device("cpu")))
    quantizer = pagedcore_quantizers()["fp8"]({})
    return quantizer.linear(weights, OPS, names, columns, rows, bias=False, dim=0), weights


def test_one_matrix_at_a_time_is_in_memory_at_full_width(tmp_path):
    save_tiny_model(tmp_path)
    names = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    _, weights = make_linear(tmp_path, names, 64, [96, 96])
    assert weights.most <= 2  # one is let go when the next has been read


class SplitOps(TorchOps):
    """A backend that wants more than one row in 8 bits, and counts who rounds."""

    def __init__(self):
        super().__init__("cpu")
        self.given = []
        self.fused = 0

    def wants_quantized(self, num_tokens, weight, scale, dtype):
        assert weight.dtype == FLOAT8
        assert scale.dtype == torch.float32
        return num_tokens > 1

    def scaled_linear(self, x, weight, scale, bias=None):
        self.given.append(isinstance(x, Quantized))
        return super().scaled_linear(x, weight, scale, bias)

    def add_rms_norm_quantized(self, x, residual, weight, eps):
        self.fused += 1
        return super().add_rms_norm_quantized(x, residual, weight, eps)

    def silu_mul_quantized(self, gate_up):
        self.fused += 1
        return super().silu_mul_quantized(gate_up)


def test_layers_round_on_their_way_where_the_backend_wants_it(tmp_path):
    from pagedcore.execution.layers import GatedMLP, RMSNorm
    from pagedcore.execution.model import ModelBuild

    save_tiny_model(tmp_path)
    ops = SplitOps()
    checkpoint = Checkpoint(tmp_path)
    build = ModelBuild(
        config=checkpoint.config,
        weights=checkpoint.tensors(torch.float32, torch.device("cpu")),
        quantizer=pagedcore_quantizers()["fp8"]({}),
        ops=ops,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_positions=16,
    )
    norm = RMSNorm(build, "model.layers.0.post_attention_layernorm", 64, 1e-5)
    mlp = GatedMLP(build, "model.layers.0.mlp", 64, 96)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    def run(x):
        normed, _ = norm.add_for(mlp, x.clone(), torch.zeros_like(x))
        return mlp(normed)

    together = run(x)
    assert (ops.given, ops.fused) == ([True, True], 2)
    alone = torch.cat([run(row[None]) for row in x])
    assert ops.given[2:] == [False] * 6
    assert ops.fused == 2
    error = (together - alone).norm() / alone.norm()
    assert 0 < error < 0.1  # the rows were rounded, and nothing else differs
