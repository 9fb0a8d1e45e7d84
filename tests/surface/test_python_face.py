"""The fourth face: what the Python API says of a request is what every server answers."""

import pytest

from pagedcore import LLM, SamplingParams
from pagedcore.engine.start import BUILD
from pagedcore.testing.tiny_models import save_tiny_model

SETTINGS = {"device": "cpu", "dtype": "float32", "max_model_len": 256}
PROMPT = "the cat sat on the mat"

CASES = {
    "greedy": {"temperature": 0, "max_tokens": 12, "ignore_eos": True},
    "drawn": {"seed": 7, "max_tokens": 12},
    "choices": {"seed": 7, "n": 3, "max_tokens": 6},
    "scores": {"temperature": 0, "max_tokens": 5, "logprobs": 2},
    "stop token": {"temperature": 0, "max_tokens": 40, "stop_token_ids": list(range(0, 300, 7))},
    "stop string": {"temperature": 0, "max_tokens": 40, "stop": ["e", "a"]},
    "edited": {"temperature": 0, "max_tokens": 8, "logit_bias": {"5": 50, "6": -100}},
    "penalised": {"temperature": 0, "max_tokens": 16, "repetition_penalty": 1.7, "min_tokens": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def real(start, folder):
    with start(folder=folder, build=BUILD, engine=SETTINGS) as server:
        yield server


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(str(folder), **SETTINGS) as engine:
        yield engine


def told(choice):
    """What a choice of an HTTP answer and one of the Python API have in common."""
    return choice["text"], choice["token_ids"], choice["finish_reason"], choice["stop_reason"]


def of_python(output):
    return [(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs]


@pytest.mark.parametrize("case", CASES)
def test_a_completion_is_the_same_from_every_face(real, llm, case):
    fields = CASES[case]
    answer = real.complete(PROMPT, **fields, return_token_ids=True).json
    (output,) = llm.generate([PROMPT], SamplingParams(**fields))
    assert [told(choice) for choice in answer["choices"]] == of_python(output)
    assert answer["choices"][0]["prompt_token_ids"] == output.prompt_token_ids
    if "logprobs" in fields:
        scores = [float(entry.logprobs[0]) for entry in output.outputs[0].logprobs]
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-4)


def test_a_conversation_is_the_same_from_every_face(real, llm):
    messages = [{"role": "user", "content": "hello there"}]
    body = {"messages": messages, "max_tokens": 10, "temperature": 0, "return_token_ids": True}
    answer = real.request("POST", "/v1/chat/completions", body).json
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=10))
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == output.outputs[0].text
    assert choice["token_ids"] == output.outputs[0].token_ids
    assert answer["usage"]["prompt_tokens"] == len(output.prompt_token_ids)


@pytest.mark.parametrize(
    "fields", [{"temperature": -1}, {"n": 0}, {"stop_token_ids": [10**6]}, {"max_tokens": 0}]
)
def test_what_one_face_refuses_the_other_refuses_with_the_same_words(real, llm, fields):
    error = real.complete(PROMPT, **fields).error
    with pytest.raises(ValueError, match=next(iter(fields))) as caught:
        llm.generate([PROMPT], SamplingParams(**fields))
    assert error["param"] == caught.value.param
