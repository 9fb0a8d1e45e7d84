"""Answers the requests that arrive through Triton: text or token ids in, text and token ids out."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import CancelledError
from typing import Any

from pagedcore.engine.client import EngineClient
from pagedcore.errors import EngineDeadError, OverloadedError, RequestError
from pagedcore.server_config import ServerConfig
from pagedcore.text.inputs import EngineInput
from pagedcore_openai.answer import Answer, Piece
from pagedcore_openai.bounded_inputs import BoundedInputs
from pagedcore_openai.counters import Slot
from pagedcore_openai.errors import ApiError
from pagedcore_openai.gate import owner_of
from pagedcore_openai.timing import now
from pagedcore_pytriton import tensors
from pagedcore_pytriton.cancellation import UID, Cancellations
from pagedcore_pytriton.tensors import Asked

logger = logging.getLogger(__name__)

PAUSE_S = 0.05
"""Seconds between two responses of a stream: each costs Triton more than a token costs us."""

_ABORT_S = 5.0

KEY_HEADERS = ("authorization", "x-api-key")
"""Headers of a gRPC request that may bring a key: Triton hands them on as parameters."""

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
        self, address: str, server: ServerConfig, cancellations: Cancellations, slot: Slot
    ) -> None:
        """`address` is the engine's socket, `slot` what this front end counts in."""
        self._client = EngineClient(address)
        self._server = server
        self._digests = [_digest(key) for key in server.api_key]
        self._cancellations = cancellations
        self._slot = slot
        self._inputs: BoundedInputs | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = False
        self.num_active = 0
        """Requests that have not been answered."""

    def begin(self, inputs: BoundedInputs) -> None:
        """Serve from now on; before, requests are refused. For other threads, as what follows."""
        self._inputs = inputs

    def drain(self) -> None:
        """Refuse what comes from now on."""
        self._draining = True

    def abort(self) -> None:
        """End everything, and disconnect from the engine. Calling it again does nothing."""
        self._draining = True
        if self._loop is not None and self._loop.is_running():
            # The loop is PyTriton's, and may end on its own.
            with contextlib.suppress(RuntimeError, TimeoutError, CancelledError):
                asyncio.run_coroutine_threadsafe(self._abort(), self._loop).result(_ABORT_S)
        self._cancellations.close()

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
                names = (KEY_PARAMETER, *KEY_HEADERS)
                owner = self._owner([str(parameters.pop(name, "")) for name in names])
                answering = self._answer(request.data, parameters, owner)
                async with contextlib.aclosing(answering) as answer:
                    async for response in answer:
                        yield [response]
        except RequestError as error:
            raise ClientError("INVALID_ARG", str(error)) from None
        except (OverloadedError, EngineDeadError) as error:
            raise ClientError("UNAVAILABLE", str(error)) from None
        except ApiError as error:  # a choice has failed
            raise ClientError("INTERNAL", str(error)) from None
        except asyncio.CancelledError:
            if self._draining:
                raise ClientError("UNAVAILABLE", "the server is shutting down") from None
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
        self._cancellations.close()
        await self._client.close()

    def _owner(self, given: list[str]) -> str:
        """Whose key is the first that is not empty; raises ClientError where it is no key."""
        if not self._digests:
            return ""
        digest = _digest(next(filter(None, given), "").removeprefix("Bearer "))
        # All are compared, so that the time tells nothing.
        if not sum(hmac.compare_digest(digest, own) for own in self._digests):
            raise ClientError(
                "INVALID_ARG",
                "an API key is needed: metadata `authorization: Bearer ...` over gRPC, the field "
                f"`{KEY_PARAMETER}` of the body over HTTP",
            )
        return owner_of(digest)

    def _check_open(self) -> BoundedInputs:
        if self._draining:
            self._slot.add("draining")
            raise OverloadedError("the server is shutting down", "draining")
        if self._inputs is None:
            self._slot.add("not_ready")
            raise OverloadedError("the model is loading", "not_ready")
        return self._inputs

    async def _answer(
        self, data: dict[str, Any], parameters: dict[str, Any], owner: str
    ) -> AsyncGenerator[dict[str, Any], None]:
        arrival = now()
        inputs = self._check_open()
        asked = tensors.read(data, parameters)
        entry = await asyncio.to_thread(self._prepare, inputs, asked)
        num_inputs = len(entry.prompt_token_ids)
        answer = Answer(
            self._client,
            inputs.tokenizer,
            [entry],
            owner=owner,
            arrival=arrival,
            slot=self._slot,
        )
        await answer.admitted()
        with contextlib.closing(answer):
            if asked.stream:
                async for piece in _as_they_come(answer):
                    yield tensors.response(asked, [piece], num_inputs)
            else:
                yield tensors.response(asked, await answer.whole(), num_inputs)

    def _prepare(self, inputs: BoundedInputs, asked: Asked) -> EngineInput:
        defaults = inputs.default_params()
        if asked.messages is not None:
            params = tensors.sampling_params(asked.sampling, {"max_tokens": None, **defaults})
            params.check_limits(self._server.sampling_limits)
            return inputs.chat(asked.messages, params)
        assert asked.prompt is not None
        if isinstance(asked.prompt, str):
            inputs.check_characters(len(asked.prompt), "text_input")
        params = tensors.sampling_params(asked.sampling, defaults)
        params.check_limits(self._server.sampling_limits)
        return inputs.completion(asked.prompt, params)


async def _as_they_come(answer: Answer) -> AsyncIterator[Piece]:
    """What is new, with a pause whenever each live choice had its turn.

    The first tokens leave at once; what arrives in a pause comes joined.
    """
    waiting = set(answer.live)
    async for piece in answer.pieces():
        if piece.text or piece.token_ids or piece.finish_reason is not None:
            yield piece
        waiting.discard(piece.index)
        if answer.live and not waiting & answer.live:
            await asyncio.sleep(PAUSE_S)
            waiting = set(answer.live)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
