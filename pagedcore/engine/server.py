"""An engine behind a unix socket: what front ends ask for goes in, what steps produced goes out.

Two threads: the caller's runs the steps, that of `Connections` talks. They share two queues and
nothing else, so a slow or hostile front end never holds up a step.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np

from pagedcore.engine import wire
from pagedcore.engine.adapters import Adapters
from pagedcore.engine.connections import Connections, Event
from pagedcore.engine.info import EngineInfo
from pagedcore.errors import EngineDeadError, PagedcoreError, RequestError
from pagedcore.request import Request
from pagedcore.step import StepOutput

logger = logging.getLogger(__name__)

STEP_TIMEOUT_S = 300.0
"""Seconds that a step may take before the engine counts as stuck."""


class ServedEngine(Protocol):
    """What is asked of an engine. See `pagedcore.engine.engine.Engine`."""

    info: EngineInfo
    adapters: Adapters

    @property
    def has_work(self) -> bool:
        """Whether `step()` has something to do."""
        ...

    def add(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queue a request; raises RequestError or OverloadedError."""
        ...

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests."""
        ...

    def step(self) -> StepOutput | None:
        """Run a step; raises only when the engine cannot go on."""
        ...

    def prepare(self) -> bool:
        """Get ready for more, while idle; False when nothing is left to prepare."""
        ...

    def stats(self) -> dict[str, float]:
        """Counters and gauges."""
        ...

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes, if nothing uses them."""
        ...

    def shutdown(self) -> None:
        """Release the device."""
        ...


class EngineServer:
    """Serves one engine to any number of front ends, in the thread that calls `serve`.

    Without work it sleeps until something arrives. When the engine fails, every front end is told
    and `serve` raises.
    """

    def __init__(
        self,
        engine: ServedEngine,
        address: str,
        *,
        step_timeout_s: float = STEP_TIMEOUT_S,
        on_stuck: Callable[[], None] | None = None,
    ) -> None:
        """Nothing is opened before `listen` or `serve`.

        :param address: path of the socket, in a folder that only its owner may enter.
        :param step_timeout_s: a step that takes longer makes the engine dead to its front ends.
        :param on_stuck: called after that, in another thread: `serve` itself cannot return.
        """
        self.address = address
        self._engine = engine
        self._step_timeout_s = step_timeout_s
        self._on_stuck = on_stuck
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._connections: Connections | None = None
        self._live: dict[int, set[int]] = {}
        self._num_steps = 0
        self._step_began: float | None = None
        self._stuck = False
        self._over = threading.Event()

    def listen(self) -> None:
        """Let front ends connect; raises ConfigError for an unusable address."""
        if self._connections is None:
            welcome = wire.Welcome(
                wire.VERSION, secrets.token_hex(8), os.getpid(), self._engine.info
            )
            self._connections = Connections(self.address, welcome, self._events, self._ping)

    def serve(self) -> None:
        """Run until `stop`; raises what made the engine fail, after telling the front ends."""
        self.listen()
        threading.Thread(target=self._watch, name="pagedcore-watchdog", daemon=True).start()
        reason = "the engine was stopped"
        try:
            while self._take_events():
                if self._engine.has_work:
                    self._step()
            if self._stuck:
                raise EngineDeadError("a step took too long")
            self._engine.abort([i for ids in self._live.values() for i in ids])
        except BaseException as error:
            reason = wire.failure_of(error).message
            raise
        finally:
            self._over.set()
            self._live.clear()
            self._front_ends.close(reason)

    def stop(self) -> None:
        """Let `serve` return after the step that runs. For other threads and signal handlers."""
        self._events.put(None)

    @property
    def _front_ends(self) -> Connections:
        assert self._connections is not None
        return self._connections

    def _take_events(self) -> bool:
        """Handle what has arrived, and wait for it if there is no work; False is the end."""
        for _ in range(self._events.qsize() or 1):  # what arrives meanwhile waits for a step
            try:
                event = self._events.get(block=not self._is_busy())
            except Empty:
                break
            if event is None:
                return False
            self._handle(*event)
        return True

    def _is_busy(self) -> bool:
        """Whether there is a step to run, or, while nothing arrives, something to prepare."""
        return self._engine.has_work or (self._events.empty() and self._engine.prepare())

    def _step(self) -> None:
        self._step_began = time.monotonic()
        output = self._engine.step()
        self._step_began = None
        self._num_steps += 1
        if output is None:
            return
        for end in output.finished:
            live = self._live.get(wire.owner_of(end.request_id))
            if live is not None:
                live.discard(end.request_id)
        self._front_ends.deliver(output)

    def _handle(self, connection: int, message: wire.FromClient | None) -> None:
        match message:
            case wire.Add():
                self._add(connection, message)
            case wire.Abort(ids=ids):
                live = self._live.get(connection, set())
                aborted = live.intersection(wire.engine_id(connection, i) for i in ids)
                live -= aborted
                self._engine.abort(aborted)
            case wire.Call(id=call_id, name=name, arguments=arguments):
                self._front_ends.send(connection, self._call(call_id, name, arguments))
            case None:
                self._engine.abort(self._live.pop(connection, ()))

    def _add(self, connection: int, message: wire.Add) -> None:
        live = self._live.setdefault(connection, set())
        try:
            family = self._family(connection, message)
            if not live.isdisjoint(request.id for request in family):
                raise RequestError(f"id {message.id} or a choice's is in use", "id")
            self._engine.add(family[0], family[1:])
        except Exception as error:
            if not isinstance(error, PagedcoreError):
                logger.exception("a request could not be added")
            refusal = wire.Refused(message.id, wire.failure_of(error))
            self._front_ends.send(connection, refusal)
            return
        live.update(request.id for request in family)
        self._front_ends.send(connection, wire.Admitted(message.id))

    def _family(self, connection: int, message: wire.Add) -> list[Request]:
        """The requests of all choices, checked: what is out of range here could end the engine."""
        info, params = self._engine.info, message.params
        if len(message.prompt_token_ids) % 4 or not message.prompt_token_ids:
            raise RequestError("the prompt must be one or more 32-bit token ids", "prompt")
        prompt = np.frombuffer(message.prompt_token_ids, np.int32)
        _check_token_range("prompt", prompt, info.vocab_size)
        for word in message.bad_words_token_ids:
            _check_token_range("bad_words", np.array(word, np.int32), info.vocab_size)
        params.check_vocabulary(info.vocab_size)
        if params.n > wire.MAX_CHOICES:
            raise RequestError(f"n may be at most {wire.MAX_CHOICES}, not {params.n}", "n")
        if params.max_tokens is None:
            params = replace(params, max_tokens=max(1, info.max_model_len - len(prompt)))
        pooling = message.pooling
        if pooling is not None:
            pooling = pooling.settled(info.pooling)
        elif info.task != "generate":
            raise RequestError(f"this model cannot generate text: it was made to {info.task}")
        now = time.monotonic()
        return [
            Request(
                id=wire.engine_id(connection, message.id + index),
                prompt_token_ids=prompt,
                params=params.for_choice(index),
                eos_token_id=message.eos_token_id,
                bad_words_token_ids=message.bad_words_token_ids,
                priority=message.priority,
                arrival_time=now,
                cache_salt=message.cache_salt,
                owner=message.owner,
                adapter=message.adapter,
                pooling=pooling,
            )
            for index in range(params.n)
        ]

    def _call(self, call_id: int, name: str, arguments: dict[str, Any]) -> wire.Reply:
        engine = self._engine
        calls: dict[str, tuple[Callable[..., Any], set[str]]] = {
            "stats": (engine.stats, set()),
            "reset_prefix_cache": (engine.reset_prefix_cache, set()),
            "adapters": (engine.adapters.listed, set()),
            "load_adapter": (engine.adapters.load, {"name", "folder"}),
            "unload_adapter": (engine.adapters.unload, {"name"}),
        }
        try:
            if name not in calls:
                known = ", ".join(["ping", *calls])
                raise RequestError(f"there is no call {name[:80]!r}; there are {known}", "name")
            function, needed = calls[name]
            if arguments.keys() != needed:
                takes = f"the texts {', '.join(sorted(needed))}" if needed else "no arguments"
                raise RequestError(f"the call {name!r} takes {takes}", "arguments")
            if not all(isinstance(value, str) for value in arguments.values()):
                raise RequestError(f"the call {name!r} takes texts", "arguments")
            return wire.Reply(call_id, function(**arguments))
        except Exception as error:
            if not isinstance(error, PagedcoreError):
                logger.exception("the call %s failed", name)
            return wire.Reply(call_id, failure=wire.failure_of(error))

    def _step_seconds(self) -> float:
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def _ping(self) -> dict[str, Any]:
        return {"num_steps": self._num_steps, "step_seconds": self._step_seconds()}

    def _watch(self) -> None:
        """Look for a step that does not end: nothing in its own thread can notice."""
        while not self._over.wait(min(1.0, self._step_timeout_s / 2)):
            if self._step_seconds() > self._step_timeout_s:
                logger.critical("a step has not ended in %g s", self._step_timeout_s)
                self._stuck = True
                self.stop()
                self._front_ends.close("the engine is stuck in a step")
                if self._on_stuck is not None:
                    self._on_stuck()
                return


def _check_token_range(name: str, token_ids: "np.ndarray[Any, Any]", vocab_size: int) -> None:
    if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
        bad = token_ids[(token_ids < 0) | (token_ids >= vocab_size)][0]
        raise RequestError(f"{name} holds token id {bad}, outside 0..{vocab_size - 1}", name)
