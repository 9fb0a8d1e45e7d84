"""Encoders compute what transformers computes: hidden states as vectors, and scores."""

import json

import numpy as np
import pytest
import torch

from pagedcore import LLM
from pagedcore.errors import ConfigError, ModelError, RequestError
from pagedcore.pooling import PoolingParams
from pagedcore.testing.tiny_models import save_tiny_model

SIZES = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=258,
)
ROBERTA = {**SIZES, "pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 66}
MODERN = {
    **SIZES,
    "cls_token_id": 256,
    "sep_token_id": 257,
    "local_attention": 8,
    "num_hidden_layers": 4,
}
ENCODERS = {
    "bert": {**SIZES, "model_type": "bert"},
    "xlm-roberta": {**ROBERTA, "model_type": "xlm-roberta"},
    "roberta": {**ROBERTA, "model_type": "roberta"},
    "modernbert": {**MODERN, "model_type": "modernbert"},
    "modernbert with biases": {
        **MODERN,
        "model_type": "modernbert",
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "classifier_pooling": "mean",
    },
}
CLASSIFIER = "AutoModelForSequenceClassification"


def make_prompts():
    generator = torch.Generator().manual_seed(2)
    lengths = (37, 5, 1, 18, 64, 36, 5)
    return [torch.randint(2, 256, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = make_prompts()


def open_llm(folder, **options):
    settings = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8}
    return LLM(str(folder), **settings | options)


@pytest.fixture(scope="module", params=ENCODERS, ids=lambda name: name.replace(" ", "-"))
def encoder(request, tmp_path_factory):
    """A folder, and the model in it as transformers runs it."""
    folder = tmp_path_factory.mktemp("encoder")
    return folder, save_tiny_model(folder, ENCODERS[request.param], reference="AutoModel")


@pytest.fixture(scope="module", params=ENCODERS, ids=lambda name: name.replace(" ", "-"))
def classifier(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    config = ENCODERS[request.param] | {"num_labels": 1}
    return folder, save_tiny_model(folder, config, reference=CLASSIFIER)


def hidden_states(model, prompt, **more):
    with torch.inference_mode():
        return model(torch.tensor([prompt]), **more).last_hidden_state[0]


def test_vectors_are_those_of_transformers_together_and_alone(encoder):
    folder, reference = encoder
    with open_llm(folder) as llm:
        for kind in ("cls", "mean", "last"):
            pooling = PoolingParams(pooling=kind, normalize=False)
            together = llm.embed(PROMPTS, pooling)
            for prompt, output in zip(PROMPTS, together, strict=True):
                hidden = hidden_states(reference, prompt)
                pooled = {"cls": hidden[0], "mean": hidden.mean(0), "last": hidden[-1]}[kind]
                assert np.abs(output.vector - pooled.numpy()).max() < 1e-4
                [alone] = llm.embed(prompt, pooling)
                assert np.abs(output.vector - alone.vector).max() < 1e-5


def test_scores_are_those_of_transformers(classifier):
    folder, reference = classifier
    with open_llm(folder) as llm:
        outputs = llm.embed(PROMPTS, "scores")
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            with torch.inference_mode():
                scores = reference(torch.tensor([prompt])).logits[0]
            assert output.vector.shape == (1,)
            assert np.abs(output.vector - scores.numpy()).max() < 1e-4
        vector = llm.embed(PROMPTS[0], PoolingParams(pooling="cls", normalize=False))[0].vector
        hidden = hidden_states(reference.base_model, PROMPTS[0])
        assert np.abs(vector - hidden[0].numpy()).max() < 1e-4


def test_scores_of_a_mean_come_in_16_bits_too(tmp_path):
    config = ENCODERS["modernbert with biases"]
    bfloat16 = torch.bfloat16
    reference = save_tiny_model(tmp_path, config, reference=CLASSIFIER, dtype=bfloat16)
    with torch.inference_mode():
        exact = reference(torch.tensor([PROMPTS[0]])).logits[0]
        own = reference.to(bfloat16)(torch.tensor([PROMPTS[0]])).logits[0].float()
    with open_llm(tmp_path, dtype="bfloat16") as llm:
        [output] = llm.embed([PROMPTS[0]], "scores")
    assert np.abs(output.vector - exact.numpy()).max() < 4 * (own - exact).abs().max() + 0.05


def test_the_second_of_two_texts_has_the_second_type(tmp_path):
    reference = save_tiny_model(tmp_path, ENCODERS["bert"], reference="AutoModel")
    first, second = PROMPTS[0][:7], PROMPTS[3]
    types = torch.tensor([[0] * len(first) + [1] * len(second)])
    hidden = hidden_states(reference, first + second, token_type_ids=types)
    with open_llm(tmp_path) as llm:
        pooling = PoolingParams(pooling="mean", normalize=False, num_first=len(first))
        [output] = llm.embed(first + second, pooling)
    assert np.abs(output.vector - hidden.mean(0).numpy()).max() < 1e-4


def test_a_prompt_may_fill_every_position_and_no_more(encoder):
    folder, _ = encoder
    with open_llm(folder) as llm:
        assert llm.engine.info.max_model_len == 64
        with pytest.raises(RequestError, match="65 tokens"):
            llm.embed([[5] * 65])


def test_an_encoder_generates_nothing_and_never_cuts_a_prompt(encoder):
    folder, _ = encoder
    with open_llm(folder) as llm, pytest.raises(RequestError, match="cannot generate"):
        llm.generate([5, 6])
    with pytest.raises(ConfigError, match="without chunked prefill"):
        open_llm(folder, max_num_batched_tokens=32)
    with open_llm(folder, max_num_batched_tokens=32, max_model_len=32) as llm:
        assert len(llm.embed([PROMPTS[3]] * 9)) == 9


def test_what_a_prompt_leaves_is_never_seen_by_another(encoder):
    """A prompt whose hidden states are not finite fails alone."""
    folder, _ = encoder
    with open_llm(folder) as llm:
        model = llm.engine._executor._model
        words = getattr(model._embedding, "_words", None)
        if words is None:
            words = model._embedding.__closure__[0].cell_contents
        before = [output.vector for output in llm.embed(PROMPTS[:3])]
        with torch.inference_mode():
            words.weight[300] = float("nan")
        outputs = llm.embed([PROMPTS[0], [5, 300, 6, 7], PROMPTS[1], PROMPTS[2]])
        assert "not finite" in outputs.pop(1).message
        for output, vector in zip(outputs, before, strict=True):
            assert np.abs(output.vector - vector).max() < 1e-5


class Folder:
    """A BERT's folder as sentence-transformers writes it."""

    def __init__(self, path):
        self.path = path
        save_tiny_model(path, ENCODERS["bert"], reference="AutoModel", num_hidden_layers=1)

    def write(self, modules, pooling=None, config=None):
        listed = [
            {
                "idx": i,
                "name": str(i),
                "path": where,
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, (kind, where) in enumerate(modules)
        ]
        (self.path / "modules.json").write_text(json.dumps(listed))
        if pooling is not None:
            (self.path / "1_Pooling").mkdir(exist_ok=True)
            (self.path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        if config is not None:
            path = self.path / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))

    def info(self):
        with open_llm(self.path) as llm:
            return llm.engine.info.pooling


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


WHOLE = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_a_folder_of_sentence_transformers_names_the_pooling(folder, pooling, expected):
    folder.write(WHOLE, pooling, {"matryoshka_dimensions": [16, 32]})
    info = folder.info()
    assert (info.pooling, info.normalize, info.size) == (expected, True, 64)
    assert (info.is_matryoshka, info.dimensions) == (True, (16, 32))
    folder.write(WHOLE[:2])
    assert folder.info().normalize is False


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([*WHOLE, ("Dense", "2_Dense")], {"pooling_mode_cls_token": True}, "'Dense'"),
        (WHOLE, {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        (WHOLE, {}, "of nothing"),
        (WHOLE, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "is built"),
        ([("Pooling", "../1_Pooling")], None, "no folder beside it"),
        ([("Pooling", "7_Pooling")], None, "is missing"),
    ],
)
def test_a_folder_that_asks_for_what_is_not_built_is_refused(folder, modules, pooling, message):
    folder.write(modules, pooling)
    with pytest.raises(ModelError, match=message):
        folder.info()


@pytest.mark.parametrize(
    ("family", "fields", "name"),
    [
        ("bert", {"hidden_size": 63}, "hidden_size"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"hidden_act": "swish"}, "hidden_act"),
        ("xlm-roberta", {"pad_token_id": 90}, "max_position_embeddings"),
        ("modernbert", {"hidden_activation": "relu"}, "hidden_activation"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_its_field(tmp_path, family, fields, name):
    save_tiny_model(tmp_path, ENCODERS[family], reference="AutoModel")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ModelError, match=name):
        open_llm(tmp_path)
