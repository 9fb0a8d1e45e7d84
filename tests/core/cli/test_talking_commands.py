"""`generate` and `chat` with a model that repeats what it hears, word by word."""

import io
import signal
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest

import pagedcore
from pagedcore import SamplingParams
from pagedcore.cli import main
from pagedcore.errors import ModelError, RequestError
from pagedcore.request import FinishReason, OutputKind


class Parrot:
    """An `LLM` that says the last message back; keeps what it was asked."""

    def __init__(self, model="parrot", **options):
        self.model, self.options = model, options
        self.asked = []
        self.closed_streams = 0
        self.is_open = True
        self.tokenizer = object()
        self.reason = FinishReason.STOP
        self.on_word = lambda count: None
        info = SimpleNamespace(model="folder", max_model_len=64, vocab_size=9)
        self.engine = SimpleNamespace(info=info)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.is_open = False

    def stream(self, prompt, params):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        self.asked.append(([dict(m) for m in prompt] if prompt is not text else text, params))
        if "too long" in text:
            raise RequestError("the prompt is too long")
        words = text.split()
        try:
            for count, word in enumerate(words, 1):
                reason = self.reason if count == len(words) else None
                yield answer(word + " ", reason)
                self.on_word(count)
        finally:
            self.closed_streams += 1

    def generate(self, prompt, params, progress):
        assert not progress
        outputs = [
            SimpleNamespace(index=i, text=f"{prompt} {i}", finish_reason=self.reason)
            for i in range(params.n)
        ]
        return [SimpleNamespace(outputs=outputs)]


def answer(text, reason):
    choice = SimpleNamespace(index=0, text=text, token_ids=[1], finish_reason=reason)
    return SimpleNamespace(outputs=[choice])


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def parrot(monkeypatch):
    """The model that commands get, in place of one that is loaded."""
    model = Parrot()

    @contextmanager
    def open_model(name, options, *, max_tokens):
        params = {k: v for k, v in options.items() if k in pagedcore.request.field_names()}
        with model:
            yield model, SamplingParams(**{"max_tokens": max_tokens, **params})

    monkeypatch.setattr("pagedcore.cli.generate.open_model", open_model)
    monkeypatch.setattr("pagedcore.cli.chat.open_model", open_model)
    return model


def say(monkeypatch, *lines, terminal=False):
    text = "".join(f"{line}\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)(text))


def test_generate_writes_the_text_as_it_comes(parrot, capsys):
    assert main(["generate", "a b c", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "a b c \n"
    assert parrot.asked[0][0] == "a b c"
    assert parrot.asked[0][1].temperature == 0.0
    assert not parrot.is_open


def test_generate_reads_the_prompt_from_a_pipe(parrot, capsys, monkeypatch):
    say(monkeypatch, "from a pipe")
    assert main(["generate"]) == 0
    assert parrot.asked[0][0] == "from a pipe"


def test_generate_needs_a_prompt(parrot, capsys, monkeypatch):
    say(monkeypatch)
    assert main(["generate"]) == 1
    assert "prompt is empty" in capsys.readouterr().err


def test_generate_numbers_several_choices(parrot, capsys):
    assert main(["generate", "x", "--n", "2"]) == 0
    assert capsys.readouterr().out == "[0] x 0\n[1] x 1\n"


@pytest.mark.parametrize("n", ["1", "2"])
def test_generate_fails_when_the_model_does(parrot, capsys, n):
    parrot.reason = FinishReason.ERROR
    assert main(["generate", "x y", "--n", n]) == 1
    assert "failed" in capsys.readouterr().err


def test_sampling_flags_are_the_fields_of_the_parameters(parrot):
    pytest.importorskip("pydantic")  # where it is loaded, values are held against the flags' types
    flags = ["--stop", "one", "--stop", "two", "--stop-token-ids", "5", "--stop-token-ids", "6"]
    flags += ["--logit-bias", '{"3": -1.5}', "--seed", "-4", "--ignore-eos", "--top-k", "1k"]
    flags += ["--repetition-detection", '{"max_pattern_size": 3, "min_count": 2}']
    assert main(["generate", "x", *flags]) == 0
    params = parrot.asked[0][1]
    assert (params.stop, params.stop_token_ids) == (("one", "two"), (5, 6))
    assert params.logit_bias == {3: -1.5}
    assert (params.seed, params.ignore_eos, params.top_k) == (-4, True, 1000)
    assert params.repetition_detection.max_pattern_size == 3


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--logit-bias", "nothing", "not JSON"),
        ("--logit-bias", "[1]", "JSON object"),
        ("--repetition-detection", '{"size": 3}', "size"),
    ],
)
def test_what_is_no_json_object_is_named(parrot, capsys, flag, value, reason):
    assert main(["generate", "x", flag, value]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert flag in error


def test_chat_through_a_pipe_writes_answers_and_nothing_else(parrot, capsys, monkeypatch):
    say(monkeypatch, "hello you", "", "and again")
    assert main(["chat"]) == 0
    assert capsys.readouterr().out == "hello you \nand again \n"
    said = [(m["role"], m["content"]) for m in parrot.asked[1][0]]
    assert said == [("user", "hello you"), ("assistant", "hello you "), ("user", "and again")]


def test_clear_forgets_all_but_the_system_message(parrot, monkeypatch):
    say(monkeypatch, "one", "/clear", "two")
    main(["chat", "--system", "be short"])
    assert [m["content"] for m in parrot.asked[1][0]] == ["be short", "two"]


def test_a_new_system_message_starts_anew(parrot, monkeypatch):
    say(monkeypatch, "one", "/system be kind", "two", "/system", "three")
    main(["chat"])
    assert [m["content"] for m in parrot.asked[1][0]] == ["be kind", "two"]
    assert parrot.asked[1][0][0]["role"] == "system"
    assert [m["content"] for m in parrot.asked[2][0]] == ["three"]


def test_exit_leaves_at_once(parrot, monkeypatch):
    say(monkeypatch, "/exit", "never said")
    assert main(["chat"]) == 0
    assert parrot.asked == []


def test_an_unknown_command_is_not_sent_to_the_model(parrot, capsys, monkeypatch):
    say(monkeypatch, "/clar")
    main(["chat"])
    assert "/help" in capsys.readouterr().err
    assert parrot.asked == []


def test_a_message_that_cannot_be_answered_is_forgotten(parrot, capsys, monkeypatch):
    say(monkeypatch, "this is too long", "short")
    assert main(["chat"]) == 0
    assert "too long" in capsys.readouterr().err
    assert [m["content"] for m in parrot.asked[1][0]] == ["short"]


def test_ctrl_c_stops_the_answer_and_not_the_program(parrot, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    parrot.on_word = lambda count: count == 2 and signal.raise_signal(signal.SIGINT)
    say(monkeypatch, "a b c d", "e")
    assert main(["chat"]) == 0
    assert capsys.readouterr().out == "a b c \ne \n"
    assert parrot.closed_streams == 2
    assert parrot.asked[1][0][1] == {"role": "assistant", "content": "a b c "}
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_leaves(parrot, monkeypatch):
    def interrupt_twice(count):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    parrot.on_word = interrupt_twice
    say(monkeypatch, "a b c d")
    assert main(["chat"]) == 130
    assert not parrot.is_open


def test_a_terminal_shows_speed_and_keeps_a_history(parrot, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    say(monkeypatch, "a b c", "/help", terminal=True)
    assert main(["chat"]) == 0
    shown = screen.getvalue()
    assert "> a b c" in shown
    assert "3 tokens" in shown
    assert "tokens/s" in shown
    assert "/system TEXT" in shown
    assert (tmp_path / "pagedcore" / "chat_history").exists()


class TextInputs:
    """The text side, as far as defaults go."""

    @classmethod
    def from_folder(cls, folder, tokenizer, **facts):
        cls.facts = facts
        return cls()

    def default_params(self):
        return {"temperature": 0.6, "top_p": 0.9}


@pytest.fixture
def loaded(monkeypatch):
    """Models that were opened through the public class, replaced by parrots."""
    models = []

    def open_parrot(model, **options):
        models.append(Parrot(model, **options))
        return models[-1]

    inputs = ModuleType("pagedcore.text.inputs")
    inputs.InputProcessor = TextInputs
    monkeypatch.setitem(sys.modules, "pagedcore.text.inputs", inputs)
    monkeypatch.setitem(vars(pagedcore), "LLM", open_parrot)
    return models


def test_the_models_own_defaults_stand_under_the_flags_that_are_given(loaded):  # SAMPLE-2
    assert main(["generate", "x", "--temperature", "0.2", "--generation-config", "none"]) == 0
    _, params = loaded[0].asked[0]
    assert (params.temperature, params.top_p, params.max_tokens) == (0.2, 0.9, 256)
    assert params.output_kind is OutputKind.DELTA
    assert TextInputs.facts["generation_config"] == "none"


def test_engine_flags_go_to_the_engine_and_the_seed_to_the_request(loaded):
    flags = ["--seed", "3", "--engine-seed", "4", "--max-model-len", "1k", "--device", "cpu"]
    assert main(["generate", "x", "--model", "here", *flags]) == 0
    assert loaded[0].model == "here"
    assert loaded[0].options == {"seed": 4, "max_model_len": 1000, "device": "cpu"}
    assert loaded[0].asked[0][1].seed == 3


def test_a_bad_parameter_is_told_before_a_model_is_loaded(loaded, capsys):
    assert main(["generate", "x", "--temperature", "-1"]) == 1
    assert "temperature must be >= 0" in capsys.readouterr().err
    assert loaded == []


def test_a_model_that_does_not_load_is_one_line(monkeypatch, loaded, capsys):
    def fail(model, **options):
        raise ModelError(f"no model at {model}")

    monkeypatch.setitem(vars(pagedcore), "LLM", fail)
    assert main(["chat", "nowhere"]) == 1
    assert capsys.readouterr().err == "pagedcore: no model at nowhere\n"
