"""The conformance kits pass what is right, and name what is wrong.

Model cases, quantizer cases: `pagedcore_model_cases`, `pagedcore_quantizer_cases`.
"""

from dataclasses import replace

import pytest
import torch

import pagedcore_models
from pagedcore.errors import ConfigError, ModelError, PluginError
from pagedcore.execution.native.ops import NativeOps
from pagedcore.execution.quantizer import Unquantized
from pagedcore.execution.stacked_experts import stacked_experts
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.scheduling.policies import FirstComeFirstServed, Priority
from pagedcore.testing.backend_kit import OPERATIONS, backend_checks
from pagedcore.testing.model_kit import Backend, check_model
from pagedcore.testing.policy_kit import check_policy
from pagedcore.testing.pooled_kit import check_pooled
from pagedcore.testing.quantizer_case import QuantizerCase, StackedCase
from pagedcore.testing.quantizer_kit import quantizer_checks
from pagedcore_models.bert import BertForSequenceClassification, BertModel
from pagedcore_models.llama import LlamaForCausalLM

CASES = pagedcore_models.pagedcore_model_cases()
LLAMA = CASES["LlamaForCausalLM"]
TORCH = Backend(name="torch", make=TorchOps)


def failures(checks):
    """What each check that fails says, by its claim."""
    said = {}
    for check in checks:
        try:
            check()
        except PluginError as error:
            said[check.claim] = str(error)
    return said


def model_error(load, ops=TorchOps, case=LLAMA, dtype=torch.float32):
    with pytest.raises(PluginError) as error:
        check_model("LlamaForCausalLM", load, case, {}, dtype, Backend(name="torch", make=ops))
    return str(error.value)


class WideNorm(LlamaForCausalLM):
    """Forgets the last norm's scale."""

    def logits(self, hidden):
        return super().logits(hidden * 1.01)


class Forgetful(TorchOps):
    """Loses the oldest position of longer sequences, but only where single tokens run."""

    def attention(self, qkv, num_heads, scale, cache, batch, soft_cap=None, sinks=None):
        if batch.num_single and batch.max_context_len > 20:
            cache.key[batch.block_tables[cache.group, :, 0].long(), 0] = 0
        return super().attention(qkv, num_heads, scale, cache, batch, soft_cap, sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_computes_something_else_fails_in_every_schedule(dtype):
    def shifted():
        class Shifted(LlamaForCausalLM):
            def logits(self, hidden):
                return super().logits(hidden.roll(1, -1))

        return Shifted

    message = model_error(shifted, dtype=dtype)
    for schedule in ("whole", "chunked", "decoded", "batched", "in one piece", "cached"):
        assert schedule in message


def test_a_small_error_is_found_in_float32():
    assert "more than" in model_error(lambda: WideNorm)


def test_a_cache_that_forgets_is_found_where_it_does():
    message = model_error(lambda: LlamaForCausalLM, ops=Forgetful)
    assert "decoded by" in message
    assert "whole by" not in message


def test_a_case_of_another_architecture_is_refused():
    case = replace(LLAMA, config={**LLAMA.config, "model_type": "qwen3"})
    assert "its case is one of Qwen3ForCausalLM" in model_error(lambda: LlamaForCausalLM, case=case)


class Leaky(BertModel):
    """Lets a prompt see those before it in the step."""

    def forward(self, token_ids, batch, caches):
        hidden = super().forward(token_ids, batch, caches)
        return hidden + 0.1 * hidden[:1] * (batch.rows.numel() > 1)


class Typeless(BertModel):
    """Takes two texts for one."""

    def forward(self, token_ids, batch, caches):
        return super().forward(token_ids, replace(batch, token_types=None), caches)


def pooled_error(name, model_class, **changes):
    case = replace(CASES[name], **changes)
    with pytest.raises(PluginError) as error:
        check_pooled(name, lambda: model_class, case, {}, torch.float32, TORCH)
    return str(error.value)


def test_an_encoder_whose_prompts_see_each_other_is_found_side_by_side():
    message = pooled_error("BertModel", Leaky)
    assert "its hidden states differ from transformers" in message
    assert "side by side by" in message
    assert "alone by" not in message


def test_an_encoder_that_takes_two_texts_for_one_is_found():
    assert "alone by" in pooled_error("BertModel", Typeless)


def test_a_classifier_of_another_vector_is_found():
    class Last(BertForSequenceClassification):
        def __init__(self, build):
            super().__init__(build)
            self.pooling = replace(self.pooling, scored="last")

    assert "its scores differ" in pooled_error("BertForSequenceClassification", Last)


def test_a_case_of_another_task_is_refused():
    message = pooled_error("BertModel", BertModel, task="classify")
    assert "made to embed; its case says classify" in message


@pytest.mark.parametrize("make", [TorchOps, NativeOps])
def test_our_backends_pass(make):
    if make is NativeOps:
        try:
            make("cpu")
        except ConfigError as error:
            pytest.skip(str(error))
    checks = list(backend_checks("ours", make, [torch.float32, torch.bfloat16], num_shapes=2))
    assert len(checks) == 2 * len(OPERATIONS)
    assert failures(checks) == {}


class Wrong(TorchOps):
    """Rounds where it should not, and adds an eps that is too large."""

    def rms_norm(self, x, weight, eps):
        return super().rms_norm(x, weight, 0.1)

    def gelu_mul(self, gate_up, *, tanh):
        return super().gelu_mul(gate_up, tanh=tanh)[:, 1:]

    def sample(self, logits, sampling):
        return super().sample(-logits, sampling)


def test_operations_that_are_wrong_are_named():
    said = failures(backend_checks("mine", Wrong, [torch.float32]))
    assert set(said) == {"norms in float32", "activations in float32", "draws in float32"}
    assert "rms_norm: the error is" in said["norms in float32"]
    assert "gelu_mul, tanh=False: [" in said["activations in float32"]


class Half:
    """A linear layer that keeps 16 bits."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

    def apply(self, x):
        return x @ self.weight.T.to(x.dtype) + self.bias.to(x.dtype)

    def wants_quantized(self, num_tokens, dtype):
        return False


class Quantizer:
    """Takes its parts, and makes of them what a subclass says."""

    name = "mine"

    def __init__(self, settings):
        if settings.get("lie"):
            raise ConfigError("that is no setting")

    def linear(self, weights, ops, names, in_features, out_features, *, bias, dim):
        parts = list(zip(names, out_features, strict=True))
        matrices = [weights.take(f"{n}.weight", (rows, in_features)) for n, rows in parts]
        biases = [weights.take(f"{n}.bias", (rows,)) for n, rows in parts]
        return self.made(torch.cat(matrices), torch.cat(biases))

    def experts(self, *arguments):
        return Unquantized().experts(*arguments)

    def made(self, weight, bias):
        return Half(weight.half(), bias)


class Careless(Quantizer):
    """Rounds too much, and keeps what it does not need."""

    def made(self, weight, bias):
        method = Half((weight * 16).round() / 16, bias)
        method.original = [{"weight": weight.float()}]
        return method


CASE = QuantizerCase(settings={}, max_error=0.004, max_bytes=2.1, lies=[{"lie": True}])


def test_a_quantizer_that_keeps_its_promises_passes():
    assert failures(quantizer_checks("mine", Quantizer, CASE)) == {}


def test_what_a_quantizer_breaks_is_named():
    case = replace(CASE, lies=[{"truth": True}])
    said = failures(quantizer_checks("mine", Careless, case))
    assert set(said) == {
        "products in float32",
        "products in bfloat16",
        "size",
        "refuses {'truth': True}",
    }
    assert "0.004 was promised" in said["products in float32"]
    assert "bytes per weight; 2.1 promised" in said["size"]


HALVES = replace(
    CASE,
    store=lambda matrix: {"weight": matrix.half()},
    stands_for=lambda matrix: matrix.half().float(),
    variants={"as it is": replace(CASE, lies=())},
    max_expert_bytes=2.0,
    stacked=StackedCase(
        store=lambda matrices: {"": matrices.mT.half()},
        stands_for=lambda matrices: matrices.half().float(),
        max_error=0.004,
        max_bytes=2.1,
    ),
)


class Shrunk:
    """Experts that count a little less, and are kept twice."""

    def __init__(self, experts):
        self.experts = experts
        self.copy = [t.clone() for t in (experts._experts.gate_up, experts._experts.down)]

    def apply(self, x, weights, chosen):
        return self.experts.apply(x, weights * 0.998, chosen)


class Inexact(Quantizer):
    """Within its bound, but not what the checkpoint says."""

    def made(self, weight, bias):
        return Half((weight * 1.002).half(), bias)

    def experts(self, *arguments):
        return Shrunk(super().experts(*arguments))


class GatesFirst(Quantizer):
    """Takes the first half of stacked rows for gates, where gates and partners take turns."""

    def stacked_experts(self, weights, ops, prefix, num_experts, h, width, clamp):
        method = stacked_experts(Unquantized(), weights, ops, prefix, num_experts, h, width, clamp)
        gate_up = method._experts.gate_up
        order = torch.stack([torch.arange(width), torch.arange(width) + width], 1).flatten()
        method._experts.gate_up = gate_up if gate_up.is_meta else gate_up[:, order]
        return method


def test_a_stored_format_that_keeps_its_promises_passes_in_every_variant():
    checks = list(quantizer_checks("mine", Quantizer, HALVES))
    assert failures(checks) == {}
    claims = [check.claim for check in checks]
    assert claims.count("experts") == claims.count("as it is: experts") == 1
    assert "equal to what is stored" in claims
    assert "stacked experts" in claims


def test_products_that_are_not_those_of_what_is_stored_are_found():
    said = failures(quantizer_checks("mine", Inexact, replace(HALVES, variants={})))
    assert set(said) == {"equal to what is stored", "experts"}
    assert "products differ" in said["equal to what is stored"]
    assert "mixtures differ from those of what is stored" in said["experts"]


def test_experts_that_are_kept_twice_are_found():
    said = failures(quantizer_checks("mine", Inexact, replace(CASE, max_expert_bytes=2.1)))
    assert "it keeps 4 bytes per weight; 2.1 promised" in said["experts"]


def test_stacked_experts_in_another_order_are_found():
    said = failures(quantizer_checks("mine", GatesFirst, HALVES))
    assert set(said) == {"stacked experts"}


def test_a_format_may_refuse_experts_unless_it_promises_how_small_they_are():
    class Without(Quantizer):
        def experts(self, *arguments):
            raise ModelError("this format is none of experts")

    assert failures(quantizer_checks("mine", Without, CASE)) == {}
    [check] = [
        check
        for check in quantizer_checks("mine", Without, replace(CASE, max_expert_bytes=1.1))
        if check.claim == "experts"
    ]
    with pytest.raises(ModelError, match="none of experts"):
        check()


class Fickle(FirstComeFirstServed):
    """Answers anew each time."""

    count = 0

    def order(self, request):
        self.count += 1
        return self.count


class Mixed(FirstComeFirstServed):
    def order(self, request):
        return request.cache_salt or 0


class Outside(FirstComeFirstServed):
    def victim(self, running):
        return len(running)


def test_our_policies_pass():
    check_policy(FirstComeFirstServed())
    check_policy(Priority())


@pytest.mark.parametrize(
    ("policy", "words"),
    [(Fickle, "another place"), (Mixed, "do not sort"), (Outside, "gives . for . requests")],
)
def test_a_policy_that_cannot_be_relied_on_is_named(policy, words):
    with pytest.raises(PluginError, match=words):
        check_policy(policy())
