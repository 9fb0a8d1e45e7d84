"""Answers the requests that arrive through Triton: text or token ids in, text and token ids out."""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from pagedcore.engine.client import Chunk, EngineClient, Generation
from pagedcore.errors import EngineDeadError, OverloadedError, RequestError
from pagedcore.request import FinishReason
from pagedcore.server_config import ServerConfig
from pagedcore.text.inputs import EngineInput, InputProcessor
from pagedcore.text.output_text import OutputText
from pagedcore_pytriton import tensors
from pagedcore_pytriton.cancellation import UID, Cancellations
from pagedcore_pytriton.tensors import Asked, News

logger = logging.getLogger(__name__)

PAUSE_S = 0.02
"""Seconds between two responses of a stream: each costs Triton more than a token costs us."""

KEY_HEADER = "authorization"
"""The header of a gRPC request that brings a key: Triton hands it on as a parameter."""

KEY_PARAMETER = "api_key"
"""The parameter that brings a key; over HTTP a field of the body, where Triton forwards no header
to a decoupled model."""


class ClientError(Exception):
    """An error for the client, as `[CODE] text`: `stub_model.py` knows this class by name."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"[{code}] {' '.join(message.split())}")


class Completions:
    """The callable behind the model, for the one event loop that PyTriton runs it in."""

    def __init__(
        self,
        address: str,
        inputs: InputProcessor,
        server: ServerConfig,
        cancellations: Cancellations,
    ) -> None:
        """`address` is the engine's socket."""
        self._client = EngineClient(address)
        self._inputs = inputs
        self._server = server
        self._cancellations = cancellations
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = False
        self.num_active = 0
        """Requests that have not been answered."""

    def drain(self) -> None:
        """Refuse what comes from now on. For other threads, like `abort`."""
        self._draining = True

    def abort(self) -> None:
        """End everything, and disconnect from the engine."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._abort(), self._loop).result()

    async def infer(self, requests: list[Any]) -> AsyncIterator[list[dict[str, Any]]]:
        """Answer one request; a generator that PyTriton runs as a task.

        Raises ClientError, and nothing else.
        """
        (request,) = requests
        self._loop = asyncio.get_running_loop()
        parameters = dict(request.parameters or {})
        self.num_active += 1
        try:
            with self._cancellations.watch(str(parameters.pop(UID, id(request)))):
                self._check_key(parameters.pop(KEY_HEADER, ""), parameters.pop(KEY_PARAMETER, ""))
                async with contextlib.aclosing(self._answer(request.data, parameters)) as answer:
                    async for news in answer:
                        yield [tensors.response(news)]
        except RequestError as error:
            raise ClientError("INVALID_ARG", str(error)) from None
        except (OverloadedError, EngineDeadError) as error:
            raise ClientError("UNAVAILABLE", str(error)) from None
        except asyncio.CancelledError:
            raise ClientError("CANCELLED", "the request was cancelled") from None
        except ClientError:
            raise
        except Exception:
            logger.exception("a request has failed")
            raise ClientError("INTERNAL", "the request has failed") from None
        finally:
            self.num_active -= 1

    async def _abort(self) -> None:
        self._cancellations.cancel_all()
        await self._client.close()

    def _check_key(self, header: object, parameter: object) -> None:
        keys = self._server.api_key
        given = str(parameter or header).removeprefix("Bearer ").encode()
        # All are looked at, so that the time tells nothing.
        if keys and not sum(hmac.compare_digest(given, key.encode()) for key in keys):
            raise ClientError(
                "INVALID_ARG",
                "an API key is needed: metadata `authorization: Bearer ...` over gRPC, the field "
                f"`{KEY_PARAMETER}` of the body over HTTP",
            )

    async def _answer(
        self, data: dict[str, Any], parameters: dict[str, Any]
    ) -> AsyncGenerator[list[News], None]:
        if self._draining:
            raise OverloadedError("the server is shutting down", "shutdown")
        asked = tensors.read(data, parameters)
        entry = await asyncio.to_thread(self._prepare, asked)
        generation = self._client.generate(
            entry.prompt_token_ids,
            entry.params,
            eos_token_id=entry.eos_token_id,
            bad_words_token_ids=entry.bad_words_token_ids,
        )
        async with generation:
            choices = _Choices(self._inputs, entry, generation)
            if not asked.stream:
                yield [news async for news in choices.whole()]
                return
            async for news in choices.as_they_come():
                yield [news]

    def _prepare(self, asked: Asked) -> EngineInput:
        defaults = self._inputs.default_params()
        if asked.messages is not None:
            params = tensors.sampling_params(asked.sampling, {"max_tokens": None, **defaults})
            params.check_limits(self._server.sampling_limits)
            return self._inputs.chat(asked.messages, params)
        assert asked.prompt is not None
        params = tensors.sampling_params(asked.sampling, defaults)
        params.check_limits(self._server.sampling_limits)
        return self._inputs.completion(asked.prompt, params)


class _Choices:
    """The text of n choices, from the tokens of a generation."""

    def __init__(self, inputs: InputProcessor, entry: EngineInput, generation: Generation) -> None:
        self._generation = generation
        self._texts = [
            OutputText(
                inputs.tokenizer,
                entry.prompt_token_ids,
                entry.params,
                eos_token_id=entry.eos_token_id,
            )
            for _ in range(entry.params.n)
        ]

    async def as_they_come(self) -> AsyncIterator[News]:
        """What is new, with a pause whenever each live choice had its turn.

        The first tokens leave at once; what arrives in a pause comes joined.
        """
        live = set(range(len(self._texts)))
        waiting = set(live)
        async for chunk in self._generation:
            news = self._news(chunk)
            if news.finish_reason is not None:
                live.discard(news.index)
            yield news
            waiting.discard(news.index)
            if live and not waiting & live:
                await asyncio.sleep(PAUSE_S)
                waiting = set(live)

    async def whole(self) -> AsyncIterator[News]:
        """Each choice once, in order, when all have ended."""
        texts: list[list[str]] = [[] for _ in self._texts]
        token_ids: list[list[int]] = [[] for _ in self._texts]
        reasons: list[FinishReason | None] = [None] * len(self._texts)
        async for chunk in self._generation:
            news = self._news(chunk)
            texts[news.index].append(news.text)
            token_ids[news.index] += news.token_ids
            reasons[news.index] = news.finish_reason
        for index, reason in enumerate(reasons):
            yield News(index, "".join(texts[index]), token_ids[index], reason)

    def _news(self, chunk: Chunk) -> News:
        if chunk.finish_reason is FinishReason.ERROR:
            raise ClientError("INTERNAL", chunk.message or "the model has failed")
        reason = chunk.finish_reason
        delta = self._texts[chunk.index].push(chunk.token_ids, finish_reason=reason)
        if delta.stop is not None and reason is None:
            self._generation.stop(chunk.index)
        if delta.stop is not None:
            reason = FinishReason.STOP
        return News(chunk.index, delta.text, chunk.token_ids[: delta.num_tokens], reason)
