"""What all requests of one front end share: the engine, the model's text side, and what runs."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from starlette.types import Receive, Scope

from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.engine.info import EngineInfo
from pagedcore.errors import EngineDeadError, OverloadedError, RequestError
from pagedcore.lora_config import MAX_NAME
from pagedcore.server_config import ServerConfig
from pagedcore.text.tokenizer import Tokenizer
from pagedcore_openai.bounded_inputs import BoundedInputs
from pagedcore_openai.counters import OPEN, Counters, Slot
from pagedcore_openai.errors import ApiError
from pagedcore_openai.watch import Watch

if TYPE_CHECKING:
    from pagedcore_openai.tracing import Tracing  # the package that it needs is an extra

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

NUM_TEXT_THREADS = 4
"""Threads that render templates and tokenise, so that no prompt holds up the event loop."""


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Surface:
    """One per event loop. It loads the model's text side when the engine is ready."""

    def __init__(
        self,
        client: EngineClient,
        config: EngineConfig,
        server: ServerConfig,
        counters: Counters,
        slot: Slot,
        tracing: "Tracing | None" = None,
    ) -> None:
        """Nothing is opened before `start`. `slot` is ours in the `counters` of all front ends."""
        self._tracing = tracing
        self.client = client
        self.config = config
        self.server = server
        self.counters = counters
        self.slot = slot
        self.draining = False
        self.aborting = False
        """Whether work is being cancelled because the server ends."""
        self.created = int(time.time())
        """When this server began, in seconds since 1970."""
        self._inputs: BoundedInputs | None = None
        self._loading: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._threads = ThreadPoolExecutor(NUM_TEXT_THREADS, thread_name_prefix="pagedcore-text")

    def start(self) -> None:
        """Begin to wait for the engine, once; for the event loop's thread."""
        if self._loading is None:
            if self._tracing is not None:
                self._tracing.start()
            self._loading = asyncio.create_task(self._load())

    async def loaded(self) -> None:
        """Wait until requests are served; raises ModelError when the text side cannot load."""
        self.start()
        assert self._loading is not None
        await asyncio.shield(self._loading)

    async def close(self) -> None:
        """Give up what is open."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait([self._loading])
        await self.client.close()
        self._threads.shutdown(wait=False)
        if self._tracing is not None:
            await self._tracing.close()

    @property
    def ready(self) -> bool:
        """Whether requests are served now."""
        return self.client.ready and self._inputs is not None and not self.draining

    @property
    def num_running(self) -> int:
        """Inference requests in flight."""
        return len(self._running)

    @property
    def info(self) -> EngineInfo:
        """The engine's; raises OverloadedError while it loads."""
        return self.client.info

    @property
    def inputs(self) -> BoundedInputs:
        """The model's text side; raises OverloadedError while it loads."""
        if self._inputs is None:
            raise OverloadedError("the model is loading", "not_ready", retry_after_s=5)
        return self._inputs

    def check_open(self) -> None:
        """Raise OverloadedError or EngineDeadError unless new work is taken (LIFE-1)."""
        if self.draining:
            raise OverloadedError("the server is shutting down", "draining", retry_after_s=5)
        if self.client.dead:
            raise EngineDeadError("it does not answer")
        _ = self.inputs

    def check_ready(self) -> None:
        """The same, for the whole server: until all front ends have begun, a client may meet one
        that has not.
        """
        self.check_open()
        if not self.counters.all_open:
            raise OverloadedError("another front end is loading", "not_ready")

    def check_open_for_work(self) -> None:
        """The same, for what counts as a request: refusals are counted (QUEUE-3)."""
        try:
            self.check_open()
        except OverloadedError as error:
            self.slot.add(error.reason)
            raise

    def check_model(self, name: str | None) -> str:
        """The name to report for the one that was asked for; raises ApiError 404 (HTTP-4)."""
        names = self.info.served_model_names
        if name and name not in names:
            raise ApiError(404, f"The model `{name[:200]}` does not exist.", "model")
        return names[0]

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that a model's name may stand for; None for the model itself.

        Only the engine knows whether there is such an adapter: it refuses the request otherwise.
        """
        if not name or not self.info.enable_lora or name in self.info.served_model_names:
            return None
        return name if len(name) <= MAX_NAME else None

    async def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return list(await self.client.call("adapters")) if self.info.enable_lora else []

    async def check_known(self, name: str | None) -> None:
        """Raise ApiError 404 unless this is a name of the model, or of a loaded adapter."""
        if self.adapter_of(name) is None or name not in await self.adapters():
            self.check_model(name)

    async def in_thread(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kw: Arguments.kwargs
    ) -> Result:
        """Run what may be slow outside the event loop, within the template's deadline."""
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, lambda: function(*args, **kw))
        try:
            return await asyncio.wait_for(work, self.server.template_timeout)
        except TimeoutError:
            limit = self.server.template_timeout
            raise RequestError(
                f"the prompt could not be prepared within {limit:g} s: shorten it"
            ) from None

    async def run(
        self, scope: Scope, receive: Receive, work: Coroutine[Any, Any, Result]
    ) -> Result:
        """Do the work of a request until its client goes away; then raise ClientGoneError.

        `abort_all` cancels the work too, with `aborting` set: it may still say good-bye.
        """
        task = asyncio.current_task()
        assert task is not None
        num_cancelled = task.cancelling()
        self._begun(task)
        if self.aborting:  # it has come in between two pieces of work
            task.cancel()
        with Watch(scope, receive, task) as watch:
            try:
                return await work
            except asyncio.CancelledError:
                if watch.is_gone:
                    raise ClientGoneError from None
                if self.aborting:
                    message = "the server is shutting down"
                    raise OverloadedError(message, "draining", retry_after_s=5) from None
                raise
            finally:
                self._ended(task)
                if watch.is_gone or self.aborting:  # what is left of the task goes on
                    while task.cancelling() > num_cancelled:
                        task.uncancel()

    def spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Do work that nobody waits for; the end of the server does, or aborts it."""
        task = asyncio.create_task(work)
        self._begun(task)
        task.add_done_callback(self._ended)
        return task

    def _begun(self, task: asyncio.Task[Any]) -> None:
        self._running.add(task)
        self._idle.clear()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not self._running:
            self._idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Take no more work, let what runs end for so long, then abort the rest (LIFE-4)."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        self.abort_all()
        await self._idle.wait()

    def abort_all(self) -> None:
        """End all work now."""
        self.draining = self.aborting = True
        for task in self._running:
            task.cancel()

    async def _load(self) -> None:
        info = await self.client.wait_ready()
        self._inputs = await asyncio.to_thread(load_inputs, self.config, info)
        self.slot.add(OPEN)


def load_inputs(config: EngineConfig, info: EngineInfo) -> BoundedInputs:
    """Read the tokenizer, the chat template and the sampling defaults of a served model.

    Raises ModelError or ConfigError where they are missing or broken.
    """
    folder = Path(info.model)
    tokenizer = Tokenizer.from_folder(_tokenizer_folder(config, folder))
    return BoundedInputs.from_folder(
        folder,
        tokenizer,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        generation_config=config.model.generation_config,
        chat_template=config.model.chat_template,
    )


def _tokenizer_folder(config: EngineConfig, model_folder: Path) -> Path:
    name = config.model.tokenizer
    if name is None:
        return model_folder
    from pagedcore.plugins import collect, load_plugins
    from pagedcore.sources import find_model

    plugins = load_plugins(config.execution.disable_plugin, config.execution.only_plugin)
    return find_model(name, collect(plugins, "pagedcore_sources"), holding="tokenizer.json")
