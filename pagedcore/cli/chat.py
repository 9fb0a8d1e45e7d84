"""`pagedcore chat`: talk to a model in this process, in a terminal or through a pipe."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pagedcore.cli.flags import command
from pagedcore.cli.local import ENGINE_FLAGS, open_model, sampling_flags
from pagedcore.config import DEFAULT_MODEL
from pagedcore.errors import RequestError
from pagedcore.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from pagedcore.engine.llm import LLM

HELP = """\
/clear          forget the conversation
/system TEXT    say what the model shall be, and start anew; without TEXT, nothing
/help           show this
/exit           leave, as Ctrl-D does
Ctrl-C stops an answer."""


@command([*sampling_flags("n", max_tokens=None), *ENGINE_FLAGS])
def chat(model: str = DEFAULT_MODEL, *, system: str | None = None, **options: Any) -> int:
    """Talk to a model; every line is a message. `/help` shows what else there is.

    Parameters
    ----------
    model
        A folder, a GGUF file, `hf:org/name`, `modelscope:org/name`, `wheel:...` or an alias.
    system
        What the model shall be.
    """
    with open_model(model, options, max_tokens=None) as (llm, params), _readline():
        talk = Talk(llm, params, system=system)
        talk.greet(model)
        while (line := talk.read()) is not None:
            if line.startswith("/"):
                if not talk.obey(line):
                    break
            elif line:
                talk.answer(line)
    return 0


class Talk:
    """One conversation. Without a terminal, only answers are written, one after the other."""

    def __init__(self, llm: "LLM", params: SamplingParams, *, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._console = Console(highlight=False)
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def greet(self, model: str) -> None:
        """Say what this is."""
        self._note(f"{model}, up to {self._llm.engine.info.max_model_len} tokens. /help, /exit")

    def read(self) -> str | None:
        """The next line; None at the end. Ctrl-C at the prompt drops what was typed."""
        while True:
            try:
                return input("> " if self._is_terminal else "").strip()
            except EOFError:
                self._note("")
                return None
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                self._note("\n/exit or Ctrl-D leaves")

    def obey(self, line: str) -> bool:
        """Do what a line that begins with a slash says; False ends the talk."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return False
        if word == "/clear":
            self.clear()
        elif word == "/system":
            self._system = rest.strip() or None
            self.clear()
        elif word == "/help":
            self._console.print(HELP, markup=False)
        else:
            self._complain(f"{word} is unknown; /help shows what there is")
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to a message; both become part of the conversation.

        What an answer has said when it is stopped stays in the conversation; a message that cannot
        be answered does not.
        """
        self._messages.append({"role": "user", "content": text})
        started, first, num_tokens, said, reason = time.perf_counter(), 0.0, 0, "", None
        try:
            with _interrupt_flag() as is_interrupted:
                for output in self._llm.stream(self._messages, self._params):
                    choice = output.outputs[0]
                    first = first or time.perf_counter()
                    num_tokens += len(choice.token_ids)
                    said, reason = said + choice.text, choice.finish_reason
                    print(choice.text, end="", flush=True)
                    if is_interrupted():
                        break
        except RequestError as error:
            self._messages.pop()
            self._complain(f"{error} (/clear forgets the conversation)")
            return
        print()
        if reason is FinishReason.ERROR:
            self._complain("the answer failed; the log says why")
        self._messages.append({"role": "assistant", "content": said})
        if num_tokens > 1:
            rate = (num_tokens - 1) / max(time.perf_counter() - first, 1e-9)
            end = "" if reason is FinishReason.STOP else f", {reason or 'stopped'}"
            latency = f"first after {first - started:.2f} s"
            self._note(f"{num_tokens} tokens, {latency}, {rate:.1f} tokens/s{end}")

    def _note(self, text: str) -> None:
        if self._is_terminal:
            self._console.print(text, style="dim", markup=False)

    def _complain(self, text: str) -> None:
        Console(stderr=True, highlight=False).print(text, style="red", markup=False)


@contextmanager
def _interrupt_flag() -> Iterator[Callable[[], bool]]:
    """While this is open, Ctrl-C sets a flag: a step of the engine must not be cut in half.

    A second Ctrl-C interrupts at once, for a step that hangs.
    """
    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _readline() -> Iterator[None]:
    """Line editing and a history that outlives the program, in a terminal that has them."""
    try:
        import readline
    except ImportError:  # Python may be built without it
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    history = state / "pagedcore" / "chat_history"
    try:
        readline.read_history_file(history)
    except OSError:
        readline.clear_history()
    try:
        yield
    finally:
        readline.set_history_length(1000)
        try:
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
        except OSError as error:
            print(f"the history could not be kept in {history}: {error}", file=sys.stderr)
