"""The offline API: batches, conversations and streams, and what it leaves alone."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from pagedcore import LLM, SamplingParams
from pagedcore.errors import EngineDeadError, RequestError
from pagedcore.request import OutputKind

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
DELTA = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, output_kind=OutputKind.DELTA)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PROMPTS = ["one", "the second prompt", "three"]


@pytest.fixture
def llm(tiny):
    with tiny.llm() as llm:
        yield llm


def texts(outputs):
    return [choice.text for output in outputs for choice in output.outputs]


def tokens(outputs):
    return [choice.token_ids for output in outputs for choice in output.outputs]


# Batches


def test_results_come_in_the_order_of_the_prompts(llm, tiny):
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert [output.prompt_token_ids for output in outputs] == ids
    assert tokens(outputs) == [tiny.greedy(prompt, 6) for prompt in ids]
    assert all(output.finished for output in outputs)


def test_text_and_token_ids_are_the_same_prompt(llm):
    [output] = llm.generate(llm.tokenizer.encode("one"), GREEDY)
    assert output.prompt is None
    assert texts([output]) == texts(llm.generate("one", GREEDY))
    assert texts(llm.generate(["one", llm.tokenizer.encode("one")], GREEDY)) == 2 * texts([output])


def test_no_prompts_are_no_results(llm):
    assert llm.generate([]) == []
    assert llm.chat([]) == []


def test_each_prompt_may_have_its_own_parameters(llm):
    params = [SamplingParams(max_tokens=1 + i, ignore_eos=True) for i in range(3)]
    assert [len(one) for one in tokens(llm.generate(PROMPTS, params))] == [1, 2, 3]


def test_more_prompts_than_a_queue_of_a_server_would_take_just_wait(tiny):  # QUEUE-2
    with tiny.llm(max_num_queued_reqs=2, max_num_queued_tokens=10) as llm:
        assert len(llm.generate([[1, 2, 3]] * 50, GREEDY)) == 50


def test_a_conversation_is_rendered_and_answered(llm):
    talk = [{"role": "user", "content": "hello"}]
    [output] = llm.chat(talk, GREEDY)
    assert output.prompt == "<s>user: hello</s><s>assistant: "
    assert texts([output]) == texts(llm.generate(output.prompt, GREEDY))
    several = llm.chat([talk, talk], GREEDY, add_generation_prompt=False)
    assert [one.prompt for one in several] == ["<s>user: hello</s>"] * 2


def test_an_answer_without_parameters_may_fill_the_models_length(llm):  # REQ-6
    [output] = llm.chat([{"role": "user", "content": "x" * 200}])
    ends = {257} & set(output.outputs[0].token_ids)
    assert ends or len(output.prompt_token_ids + output.outputs[0].token_ids) == 256
    assert len(llm.generate("one")[0].outputs[0].token_ids) <= 16


def test_the_models_own_parameters_stand_under_explicit_ones(tiny, tmp_path):  # SAMPLE-2
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    own = {"temperature": 0.0, "top_k": 5, "repetition_penalty": 2.0, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    with LLM(folder, device="cpu", dtype="float32", cpu_kv_cache_gib=0.01) as llm:
        own_params = llm.default_params()
        assert (own_params.temperature, own_params.max_tokens) == (0.0, 3)
        assert tokens(llm.generate("one")) == tokens(llm.generate("one", own_params))
        assert len(tokens(llm.chat([{"role": "user", "content": "one"}]))[0]) <= 3
        explicit = llm.default_params(temperature=0.5, max_tokens=7)
        assert (explicit.temperature, explicit.top_k, explicit.max_tokens) == (0.5, 5, 7)
        assert explicit.repetition_penalty == 2.0
        assert llm.generate("one", SamplingParams(temperature=0)) != llm.generate("one")
    settings = dict(device="cpu", dtype="float32", cpu_kv_cache_gib=0.01)
    with LLM(folder, generation_config="none", **settings) as llm:
        assert llm.default_params() == SamplingParams()


# Errors, before anything runs

INVALID = {
    "a number": (5, None, "a prompt must be text or a list of token ids"),
    "nothing": (None, None, "not NoneType"),
    "bytes": (b"one", None, "not bytes"),
    "a mapping": ({"prompt": "one"}, None, "not dict"),
    "a tensor": (torch.ones(3, dtype=torch.int64), None, "not Tensor"),
    "a number among texts": (["one", 5], None, "not int"),
    "text among token ids": ([5, "one"], None, "list of token ids"),
    "a truth value": ([True], None, "list of token ids"),
    "numpy's numbers": ([[np.int64(1)]], None, "list of token ids"),
    "empty text": (["one", ""], None, "prompt must not be empty"),
    "no tokens": ([[1], []], None, "prompt must have at least one token"),
    "half a character": ("\ud800", None, "valid Unicode"),
    "an unknown token": ([[1], [320]], None, "token id 320, outside 0..319"),
    "a negative token": ([-1], None, "token id -1, outside 0..319"),
    "too long": ([[1], [1] * 256], GREEDY, "has 256 tokens and max_tokens is 6.*256 tokens"),
    "a mapping as parameters": (
        "one",
        {"temperature": 0},
        "params must be SamplingParams, not dict",
    ),
    "too few parameters": (["one", "two"], [GREEDY], "2 prompts need as many params, not 1"),
    "an unknown stop token": ("one", SamplingParams(stop_token_ids=[400]), "token id 400"),
    "an unknown biased token": ("one", SamplingParams(logit_bias={-5: 1}), "token id -5"),
    "an unknown allowed token": ("one", SamplingParams(allowed_token_ids=[320]), "token id 320"),
    "too many choices": ("one", SamplingParams(n=129), "n may have at most 128, not 129"),
    "too many log-probabilities": ("one", SamplingParams(logprobs=21), "must be in 0..20, not 21"),
    "all log-probabilities": ("one", SamplingParams(prompt_logprobs=-1), "must be in 0..20"),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_invalid_is_told_before_anything_runs(llm, name):  # SAMPLE-1, SAMPLE-4, REQ-7
    prompts, params, words = INVALID[name]
    with pytest.raises(RequestError, match=words):
        llm.generate(prompts, params)
    assert not llm.engine.has_work
    assert tokens(llm.generate("one", GREEDY)) == tokens(llm.generate(["one"], [GREEDY]))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "must be a list of messages, not str"),
        (None, "must be a list of messages, not NoneType"),
        ([[]], "at least one message"),
        ([{"role": "user"}], r"messages\[0\].content"),
        ([{"content": "hello"}], r"messages\[0\].role"),
        ([{"role": "user", "content": "x" * 300}], "share the model's length of 256 tokens"),
        (["hello"], "messages"),
    ],
)
def test_an_invalid_conversation_is_told_before_anything_runs(llm, messages, words):
    with pytest.raises(RequestError, match=words):
        llm.chat(messages, GREEDY)
    assert not llm.engine.has_work


@pytest.mark.parametrize("prompt", [3, None, [], "", ["one"], [[1, 2]], b"one"])
def test_an_invalid_stream_is_told_where_it_is_asked_for(llm, prompt):
    with pytest.raises(RequestError):
        llm.stream(prompt)
    assert not llm.engine.has_work


def test_options_of_a_chat_template_are_of_no_use_to_a_prompt(llm):
    with pytest.raises(RequestError, match="tools: only a conversation"):
        llm.stream("one", tools=[])


def test_limits_can_be_raised(tiny):
    with tiny.llm(max_logprobs=-1, max_n=200, max_num_seqs=64) as llm:
        params = SamplingParams(n=130, logprobs=-1, max_tokens=1)
        [output] = llm.generate("one", params)
        assert len(output.outputs) == 130
        assert len(output.outputs[0].logprobs[0].token_ids) == 320


# Streams


def test_a_stream_grows_to_what_a_batch_gives(llm):
    items = list(llm.stream("one", GREEDY))
    assert [len(item.outputs[0].token_ids) for item in items] == [1, 2, 3, 4, 5, 6]
    assert [item.finished for item in items] == [False] * 5 + [True]
    assert texts(items[-1:]) == texts(llm.generate("one", GREEDY))


def test_a_conversation_streams(llm):
    talk = [{"role": "user", "content": "hello"}]
    items = list(llm.stream(talk, DELTA))
    assert "".join(texts(items)) == texts(llm.chat(talk, GREEDY))[0]


def test_an_item_is_not_changed_by_later_steps(llm):
    stream = llm.stream("one", SamplingParams(max_tokens=4, logprobs=1, prompt_logprobs=1))
    first = next(stream)
    before = repr(first)
    assert len(list(stream)) == 3
    assert repr(first) == before


def test_leaving_a_stream_aborts_it(llm):  # CANCEL-1
    for item in llm.stream("one", LONG):
        if len(item.outputs[0].token_ids) == 3:
            break
    del item
    llm.generate("two", GREEDY)
    stats = llm.engine.stats()
    assert (stats["request_success_abort"], stats["request_success_length"]) == (1, 1)
    assert stats["kv_cache_usage_perc"] == 0


def test_a_stream_that_nobody_reads_costs_nothing(llm):
    streams = [llm.stream("one", LONG) for _ in range(3)]
    assert not llm.engine.has_work
    del streams
    assert not llm.engine.has_work


@pytest.mark.parametrize("in_flight", [False, True])
def test_streams_and_batches_do_not_take_each_others_tokens(tiny, in_flight):
    """All take steps of one engine, and each step brings tokens for all."""
    with tiny.llm(in_flight=in_flight) as llm:
        alone = [tokens(llm.generate(prompt, LONG))[0] for prompt in PROMPTS]
        left, right, leaving = (llm.stream(prompt, LONG) for prompt in PROMPTS)
        for _ in range(3):
            seen = [next(stream).outputs[0].token_ids for stream in (left, right, leaving)]
        assert seen == [tokens[: len(seen[i])] for i, tokens in enumerate(alone)]
        leaving.close()
        assert tokens(llm.generate(PROMPTS, GREEDY)) == [tokens[:6] for tokens in alone]
        assert [item.outputs[0].token_ids for item in right][-1] == alone[1]
        assert next(left).outputs[0].token_ids == alone[0]  # it ended meanwhile
        assert list(left) == []
        assert not llm.engine.has_work


def test_deltas_of_streams_side_by_side_lose_nothing(llm):
    left, right = (llm.stream(prompt, DELTA) for prompt in PROMPTS[:2])
    pieces = [next(left), *right, *left]
    joined = "".join(texts(pieces[:1] + pieces[-1:]))
    assert joined == texts(llm.generate(PROMPTS[0], GREEDY))[0]


def test_what_is_aborted_in_the_engine_ends(llm):
    stream = llm.stream("one", LONG)
    next(stream)
    llm.engine.abort([0])
    *_, last = stream
    assert last.outputs[0].finish_reason == "abort"


def test_a_failed_step_ends_those_in_it_and_says_why(llm, monkeypatch, caplog):  # ERR-4
    def fail(plan):
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine._executor, "launch", fail)
        outputs = llm.generate(PROMPTS, GREEDY)
    assert {choice.outputs[0].finish_reason for choice in outputs} == {"error"}
    assert "the device is on fire" in outputs[0].outputs[0].message
    assert "the device is on fire" in caplog.text
    assert len(tokens(llm.generate("one", GREEDY))[0]) == 6


def test_an_interrupted_batch_is_aborted(llm, monkeypatch):
    step, count = llm.engine.step, iter(range(100))

    def interrupted():
        if next(count) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, LONG)
    assert llm.engine.stats()["request_success_abort"] == 3
    assert [len(one) for one in tokens(llm.generate(PROMPTS, GREEDY))] == [6] * 3


# Life


def test_a_closed_model_says_so_and_may_be_closed_again(tiny):
    with tiny.llm() as llm:
        stream = llm.stream("one", LONG)
        unread = llm.stream("one", LONG)
        next(stream)
    llm.close()
    for use in (lambda: llm.generate("one"), lambda: llm.chat([]), lambda: llm.stream("one")):
        with pytest.raises(EngineDeadError, match="was closed"):
            use()
    for one in (stream, unread):
        with pytest.raises(EngineDeadError, match="was closed"):
            next(one)


def test_two_models_in_one_process_do_not_disturb_each_other(tiny, tmp_path):
    from pagedcore.testing.tiny_models import greedy_tokens, save_tiny_model

    other = save_tiny_model(tmp_path, "qwen2", num_hidden_layers=1, seed=9)
    with tiny.llm(max_num_batched_tokens=8) as one, tiny.llm(seed=3) as two:
        with LLM(str(tmp_path), dtype="float32", device="cpu", cpu_kv_cache_gib=0.01) as three:
            ids = one.tokenizer.encode("one")
            streams = [llm.stream(ids, DELTA) for llm in (one, two, three)]
            rounds = list(zip(*streams, strict=True))
        got = [[token for item in items for token in item.outputs[0].token_ids]
               for items in zip(*rounds, strict=True)]  # fmt: skip
        expected = tiny.greedy(ids, 6)
        assert got == [expected, expected, greedy_tokens(other, ids, 6)]
        assert tokens(one.generate([ids], GREEDY)) == [expected]  # the third one is closed


def test_nothing_global_is_changed(tiny):  # LIFE-3
    def state():
        return (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.initial_seed(),
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            logging.getLogger().handlers[:],
            logging.getLogger().level,
            logging.getLogger("pagedcore").handlers[:],
            [signal.getsignal(number) for number in sorted(signal.valid_signals())],
            sys.excepthook,
            threading.active_count(),
        )

    before = state()
    with tiny.llm() as llm:
        assert state() == before
        stream = llm.stream("one", SamplingParams(temperature=1, max_tokens=8))
        next(stream)
        assert state() == before
        llm.generate(PROMPTS, SamplingParams(temperature=0.7, n=2))
        list(stream)
    assert state() == before


def test_a_script_needs_no_main_guard(tiny, tmp_path):  # LIFE-3
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pagedcore import LLM, SamplingParams\n"
        f"llm = LLM({str(tiny.folder)!r}, device='cpu', dtype='float32', max_num_seqs=2)\n"
        "print(llm.generate('one', SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),)"
        "[0].outputs[0].token_ids)\n"
        "print('transformers' in sys.modules)\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = tiny.greedy([ord("o") - ord("!"), ord("n") - ord("!"), ord("e") - ord("!")], 6)
    assert done.stdout.splitlines() == [str(expected), "False"]
    assert done.stderr == ""


# The bar


class Terminal:
    """A stderr that is a terminal."""

    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_a_terminal_shows_progress_on_stderr_if_wanted(llm, monkeypatch, capsys, progress):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        llm.generate(PROMPTS, GREEDY, progress=progress)
    assert ("3/3" in terminal.written) == progress
    assert capsys.readouterr().out == ""


def test_elsewhere_there_is_no_bar(llm, capsys):
    llm.generate(PROMPTS, GREEDY)
    llm.chat([{"role": "user", "content": "hello"}], GREEDY)
    assert capsys.readouterr() == ("", "")
