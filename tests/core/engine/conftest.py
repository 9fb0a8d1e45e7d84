"""Engines without a model, behind real sockets."""

import asyncio
import os
import threading
from contextlib import contextmanager

import pytest

from pagedcore.engine.client import EngineClient
from pagedcore.engine.server import EngineServer
from pagedcore.testing.fake_engine import FakeEngine


@pytest.fixture
def address(tmp_path):
    os.chmod(tmp_path, 0o700)
    return str(tmp_path / "engine.sock")


class Serving:
    """An engine that is served from a thread; `error` is what `serve` raised."""

    def __init__(self, engine, address, **options):
        self.engine = engine
        self.server = EngineServer(engine, address, **options)
        self.error = None
        self.server.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        try:
            self.server.serve()
        except Exception as error:
            self.error = error

    def join(self):
        self._thread.join(30)
        assert not self._thread.is_alive()

    def stop(self):
        self.engine.release()
        self.server.stop()
        self.join()


@pytest.fixture
def serve(address):
    """Serve engines at `address`: `serve(FakeEngine())`; all are stopped in the end."""
    started = []

    def start(engine=None, **options):
        serving = Serving(engine or FakeEngine(), address, **options)
        started.append(serving)
        return serving

    yield start
    for serving in started:
        serving.stop()


@pytest.fixture
def run(address):
    """Run `use(client)` in an event loop, with a client of what is served at `address`."""

    def in_loop(use, *, num_clients=1, **options):
        async def main():
            clients = [EngineClient(address, **options) for _ in range(num_clients)]
            try:
                for client in clients:
                    await asyncio.wait_for(client.wait_ready(), 30)
                return await asyncio.wait_for(use(*clients), 60)
            finally:
                for client in clients:
                    await client.close()

        return asyncio.run(main())

    return in_loop


@pytest.fixture
def paused():
    """A context in which an engine takes requests and produces nothing."""

    @contextmanager
    def pause(engine):
        engine.pause()
        try:
            yield
        finally:
            engine.release()

    return pause


class TinyModel:
    """A model folder, and what transformers says of it."""

    def __init__(self, folder, family="llama", **fields):
        from pagedcore.testing.tiny_models import save_tiny_model

        self.folder = folder
        self.reference = save_tiny_model(folder, family, num_hidden_layers=2, **fields)

    def llm(self, *, in_flight=False, **options):
        """The model in float32 with room for a few sequences; `options` go over that.

        With `in_flight`, steps overlap, which they otherwise do on a GPU only.
        """
        from pagedcore import LLM
        from pagedcore.engine.engine import Engine

        settings = {
            "dtype": "float32",
            "device": "cpu",
            "max_num_seqs": 8,
            "num_gpu_blocks_override": 200,
        }
        llm = LLM(str(self.folder), **settings | options)
        if in_flight:
            built = llm.engine
            parts = built._scheduler, built._executor, built.info
            llm._engine = Engine(*parts, async_scheduling=True)
        return llm

    def greedy(self, prompt, num_tokens):
        """What transformers generates."""
        from pagedcore.testing.tiny_models import greedy_tokens

        return greedy_tokens(self.reference, prompt, num_tokens)

    def logits(self, token_ids):
        """The logits [T, V] after each of T tokens, as transformers computes them."""
        import torch

        with torch.inference_mode():
            return self.reference(torch.tensor([token_ids])).logits[0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return TinyModel(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def windowed(tmp_path_factory):
    """The same with two groups of caches: its second layer looks back 12 positions only."""
    window = dict(use_sliding_window=True, sliding_window=12, max_window_layers=1)
    return TinyModel(tmp_path_factory.mktemp("windowed"), "qwen2", **window)
