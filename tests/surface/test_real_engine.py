"""The whole way to a real, tiny model: what the surface says of tokens is what the model does."""

import math

import pytest

from pagedcore.engine.start import BUILD

PROMPT = "the cat sat on the mat"
LENGTH = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with random weights, and the model as transformers runs it."""
    from pagedcore.testing.tiny_models import save_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    return folder, save_tiny_model(folder)


@pytest.fixture(scope="module")
def real(start, model):
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": LENGTH}
    with start(
        folder=model[0], build=BUILD, engine=settings, enable_prompt_tokens_details=True
    ) as server:
        yield server


def ids_of(server, text):
    return server.request("POST", "/tokenize", {"prompt": text}).json["tokens"]


def test_greedy_tokens_are_those_of_transformers(real, model):
    from pagedcore.testing.tiny_models import greedy_tokens

    prompt = ids_of(real, PROMPT)
    fields = dict(temperature=0, max_tokens=24, ignore_eos=True, return_token_ids=True)
    choice = real.complete(prompt, **fields).json["choices"][0]
    assert choice["token_ids"] == greedy_tokens(model[1], prompt, 24)

    chunks = real.complete(prompt, **fields, stream=True).chunks
    streamed = [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]]
    assert streamed == choice["token_ids"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


def test_prompt_scores_are_those_of_transformers(real, model):
    import torch

    prompt = ids_of(real, PROMPT)
    body = real.complete(prompt, max_tokens=1, logprobs=1, echo=True).json
    told = body["choices"][0]["logprobs"]["token_logprobs"][1 : len(prompt)]
    with torch.inference_mode():
        logits = model[1](torch.tensor([prompt])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert told == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_choices_share_a_prompt_and_its_scores(real, stream):
    answer = real.complete(
        PROMPT, n=4, seed=3, max_tokens=6, logprobs=2, echo=True, stream=stream, ignore_eos=True
    )
    values = [[] for _ in range(4)]
    for body in answer.chunks if stream else [answer.json]:
        for choice in body["choices"]:
            values[choice["index"]] += (choice["logprobs"] or {"token_logprobs": []})[
                "token_logprobs"
            ]
    num_prompt = len(ids_of(real, PROMPT))
    assert [len(each) for each in values] == [num_prompt + 6] * 4
    assert len({tuple(each[:num_prompt]) for each in values}) == 1
    assert all(math.isfinite(value) for each in values for value in each[1:])


def test_a_seed_makes_choices_the_same_again(real):  # SAMPLE-10
    fields = dict(n=3, seed=11, max_tokens=12, ignore_eos=True, return_token_ids=True)
    first, second = (real.complete(PROMPT, **fields).json["choices"] for _ in range(2))
    tokens = [choice["token_ids"] for choice in first]
    assert tokens == [choice["token_ids"] for choice in second]
    single = real.complete(PROMPT, **{**fields, "n": 1, "seed": 12}).json["choices"][0]
    assert single["token_ids"] == tokens[1]


def test_a_prompt_that_was_seen_is_found_in_the_cache(real):  # USAGE-3
    prompt = "a prompt that is longer than one block of the cache, and then some"
    real.complete(prompt, max_tokens=1)
    usage = real.complete(prompt, max_tokens=1).json["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < usage["prompt_tokens"]
    salted = real.complete(prompt, max_tokens=1, cache_salt="mine").json["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0  # IN-48


def test_a_conversation_is_answered(real):
    with real.client() as client:
        stream = client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert chunks[-1].usage.completion_tokens <= 8
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_what_has_ended_is_counted_and_nothing_runs(real):  # METRIC-10
    text = real.get("/metrics").body.decode()
    values = {
        line.rpartition(" ")[0].partition("{")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert values["pagedcore:num_requests_running"] == 0
    assert values["pagedcore:num_requests_waiting"] == 0
    assert values["pagedcore:kv_cache_usage_perc"] == 0
    assert values["pagedcore:generation_tokens_total"] > 0
    assert values["pagedcore:iteration_tokens_total_count"] > 0  # METRIC-8
    assert values["pagedcore:iteration_tokens_total_sum"] >= values["pagedcore:prompt_tokens_total"]
    ended = values["pagedcore:request_num_preemptions_count"]
    assert ended >= values["pagedcore:request_generation_tokens_count"]


def test_vectors_are_those_of_transformers(real, model):  # EMB-1
    import torch

    texts = [PROMPT, "a dog", PROMPT * 5]
    with real.client() as client:
        vectors = [
            item.embedding for item in client.embeddings.create(model="fake", input=texts).data
        ]
    for text, vector in zip(texts, vectors, strict=True):
        with torch.inference_mode():
            hidden = model[1].model(torch.tensor([ids_of(real, text)])).last_hidden_state[0, -1]
        assert vector == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-4)


def test_a_classifier_of_pairs_ranks_as_transformers_does(face, start, tmp_path):
    import torch

    from pagedcore.testing.tiny_models import SIZES, save_tiny_model

    if face != "asgi":
        pytest.skip("what differs between mounts was seen above")
    config = {**SIZES, "model_type": "bert", "num_labels": 1, "pad_token_id": 258}
    reference = save_tiny_model(
        tmp_path, config, reference="AutoModelForSequenceClassification", num_hidden_layers=2
    )
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": LENGTH}
    documents = ["a dog", "the cat", "x"]
    with start(folder=tmp_path, build=BUILD, engine=settings) as server:
        body = {"query": PROMPT, "documents": documents}
        answer = server.request("POST", "/v1/rerank", body).json
        query = ids_of(server, PROMPT)
        for result in answer["results"]:
            second = ids_of(server, documents[result["index"]])
            types = torch.tensor([[0] * len(query) + [1] * len(second)])
            with torch.inference_mode():
                score = reference(torch.tensor([query + second]), token_type_ids=types).logits
            assert result["relevance_score"] == pytest.approx(float(score.sigmoid()), abs=1e-4)
        scores = [result["relevance_score"] for result in answer["results"]]
        assert scores == sorted(scores, reverse=True)
