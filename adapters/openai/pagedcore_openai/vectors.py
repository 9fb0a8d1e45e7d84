"""Routes that answer with vectors or scores: /v1/embeddings, /v1/score and /v1/rerank."""

import asyncio
import base64
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from pagedcore.errors import RequestError
from pagedcore.pooling import PoolingParams
from pagedcore.text.inputs import PooledInput
from pagedcore_openai.bounded_inputs import BoundedInputs
from pagedcore_openai.errors import ApiError
from pagedcore_openai.gate import ARRIVAL, DEADLINE, REQUEST_ID
from pagedcore_openai.intake import Intake
from pagedcore_openai.openapi import describe
from pagedcore_openai.prepare import check_priority
from pagedcore_openai.request_trace import trace_of
from pagedcore_openai.surface import ClientGoneError, Surface
from pagedcore_openai.vector_answer import Room, Vector, VectorAnswer
from pagedcore_openai.vector_protocol import (
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    VectorFields,
    documents_of,
    inputs_of,
    pairs_of,
)

CLIENT_CLOSED_REQUEST = 499
"""The status that nobody is there to read."""

_VALUES_AT_ONCE = 1 << 16
"""Numbers that are written as JSON before others have their turn."""

SCORE_PATHS = ("/v1/score", "/score")
RERANK_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")

Items = list[tuple[PooledInput, PoolingParams]]


class Vectors:
    """The routes of one surface."""

    def __init__(self, surface: Surface, intake: Intake) -> None:
        self._surface = surface
        self._intake = intake
        self._room = Room(surface.client)

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        post = partial(app.add_api_route, methods=["POST"])
        post("/v1/embeddings", self.embeddings, **describe(EmbeddingRequest, works=True))
        for path in SCORE_PATHS:
            post(path, self.score, **describe(ScoreRequest, works=True))
        for path in RERANK_PATHS:
            post(path, self.rerank, **describe(RerankRequest, works=True))

    async def embeddings(self, request: Request) -> Response:
        """Turn texts or token ids into vectors."""
        return await self.embed(request, await self._intake.body(request))

    async def embed(self, request: Request, body: dict[str, Any]) -> Response:
        """The same, of a body that was read already."""
        fields, headers = self._intake.checked(EmbeddingRequest, body)
        model = self._check(fields)
        if fields.cache_salt == "":
            raise RequestError("cache_salt must not be empty", "cache_salt")
        pooling = self._settled(fields)
        most = self._surface.server.max_prompts_per_request
        items = await self._surface.in_thread(
            embedding_items, fields, pooling, self._surface.inputs, most
        )
        found = await self._run(request, fields, items, fields.cache_salt)
        if found is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        vectors, answer = found
        encoded = await _encoded(vectors, as_base64=fields.encoding_format == "base64")
        data = [
            {"object": "embedding", "index": i, "embedding": raw} for i, raw in enumerate(encoded)
        ]
        return self._answer({"object": "list", "data": data, "model": model}, answer, headers)

    async def score(self, request: Request) -> Response:
        """How well the texts of pairs belong together."""
        body = await self._intake.body(request)
        self._check_task()
        fields, headers = self._intake.checked(ScoreRequest, body)
        model = self._check(fields)
        pairs = pairs_of(fields, self._surface.server.max_prompts_per_request)
        found = await self._scores(request, fields, pairs)
        if found is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        scores, answer = found
        data = [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores)]
        envelope = self._envelope(request, "score", model)
        return self._answer({**envelope, "object": "list", "data": data}, answer, headers)

    async def rerank(self, request: Request) -> Response:
        """Documents in the order in which they answer a query."""
        body = await self._intake.body(request)
        self._check_task()
        fields, headers = self._intake.checked(RerankRequest, body)
        model = self._check(fields)
        texts = documents_of(fields, self._surface.server.max_prompts_per_request)
        query = fields.query or ""
        found = await self._scores(request, fields, [(query, text) for text in texts])
        if found is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        scores, answer = found
        order = sorted(range(len(texts)), key=lambda i: -scores[i])[: fields.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
        if fields.return_documents is not False:
            for result in results:
                result["document"] = {"text": texts[result["index"]]}
        envelope = self._envelope(request, "rerank", model)
        return self._answer({**envelope, "results": results}, answer, headers)

    def _check_task(self) -> None:
        """A model that was made to generate has no scores to give (HTTP-2)."""
        if self._surface.info.task == "generate":
            raise ApiError(501, "this model generates text; it gives no scores")

    def _check(self, fields: VectorFields) -> str:
        """Refuse what needs no tokenizer to be refused; the model's name."""
        check_priority(fields.priority, self._surface.config.scheduler.scheduling_policy)
        return self._surface.check_model(fields.model)

    def _settled(self, fields: EmbeddingRequest) -> PoolingParams:
        """What is asked for; what this model cannot cut is 422 (EMB-1)."""
        model = self._surface.info.pooling
        asked = PoolingParams(
            pooling=fields.pooling, normalize=fields.normalize, dimensions=fields.dimensions
        )
        try:
            return asked.settled(model)
        except RequestError as error:
            if error.param == "dimensions" and not model.is_matryoshka:
                raise ApiError(422, str(error), "dimensions") from None
            raise

    async def _scores(
        self, request: Request, fields: VectorFields, pairs: Sequence[tuple[str, str]]
    ) -> tuple[list[float], VectorAnswer] | None:
        """What a classifier says of each pair; of other models, how alike the vectors are."""
        surface = self._surface
        model = surface.info.pooling
        if surface.info.task != "classify":
            return await self._likenesses(request, fields, pairs)
        if model.num_labels != 1:
            raise RequestError(
                f"this model's classifier has {model.num_labels} labels; scores need one"
            )
        items = await surface.in_thread(pair_items, pairs, fields, surface.inputs)
        found = await self._run(request, fields, items)
        if found is None:
            return None
        vectors, answer = found
        return [float(1 / (1 + np.exp(-np.float64(vector[0])))) for vector in vectors], answer

    async def _likenesses(
        self, request: Request, fields: VectorFields, pairs: Sequence[tuple[str, str]]
    ) -> tuple[list[float], VectorAnswer] | None:
        surface = self._surface
        pooling = PoolingParams(normalize=True).settled(surface.info.pooling)
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        items = await surface.in_thread(text_items, texts, pooling, fields, surface.inputs)
        found = await self._run(request, fields, items)
        if found is None:
            return None
        vectors, answer = found
        by_text = dict(zip(texts, vectors, strict=True))
        return [float(by_text[a] @ by_text[b]) for a, b in pairs], answer

    async def _run(
        self,
        request: Request,
        fields: VectorFields,
        items: Items,
        cache_salt: str | None = None,
    ) -> tuple[list[Vector], VectorAnswer] | None:
        """The vectors of all items; None when nobody waits for them any more."""
        surface = self._surface
        answer = VectorAnswer(
            surface.client,
            items,
            priority=fields.priority or 0,
            cache_salt=cache_salt,
            deadline=request.scope["state"][DEADLINE],
            arrival=request.scope["state"][ARRIVAL],
            slot=surface.slot,
            room=self._room,
        )
        trace = trace_of(request)
        if trace is not None:
            trace.asked(fields.model or surface.info.served_model_names[0], answer)
        try:
            return await surface.run(request.scope, request.receive, answer.whole()), answer
        except ClientGoneError:
            return None

    def _envelope(self, request: Request, kind: str, model: str) -> dict[str, Any]:
        request_id = request.scope["state"][REQUEST_ID]
        return {"id": f"{kind}-{request_id}", "created": int(time.time()), "model": model}

    def _answer(
        self, body: dict[str, Any], answer: VectorAnswer, headers: dict[str, str]
    ) -> Response:
        num_tokens = answer.num_prompt_tokens
        usage: dict[str, Any] = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        if self._surface.server.enable_prompt_tokens_details:
            usage["prompt_tokens_details"] = {"cached_tokens": answer.num_cached_tokens}
        encoded = msgspec.json.encode({**body, "usage": usage})
        return Response(encoded, 200, headers, media_type="application/json")


def embedding_items(
    fields: EmbeddingRequest, pooling: PoolingParams, inputs: BoundedInputs, most: int
) -> Items:
    """One item per text or list of token ids; raises RequestError."""
    found: Items = []
    for prompt in inputs_of(fields.input, most):
        inputs.check_characters(len(prompt), "input")
        item = inputs.pooled(
            prompt,
            add_special_tokens=fields.add_special_tokens is not False,
            truncate_prompt_tokens=fields.truncate_prompt_tokens,
        )
        found.append((item, pooling))
    return found


def text_items(
    texts: Sequence[str], pooling: PoolingParams, fields: VectorFields, inputs: BoundedInputs
) -> Items:
    """One item per text; raises RequestError."""
    found: Items = []
    for text in texts:
        inputs.check_characters(len(text), "text")
        keep = fields.truncate_prompt_tokens
        found.append((inputs.pooled(text, truncate_prompt_tokens=keep, param="text"), pooling))
    return found


def pair_items(
    pairs: Sequence[tuple[str, str]], fields: VectorFields, inputs: BoundedInputs
) -> Items:
    """One item per pair, for a classifier; raises RequestError."""
    found: Items = []
    for first, second in pairs:
        inputs.check_characters(len(first) + len(second), "text")
        keep = fields.truncate_prompt_tokens
        item = inputs.pair(first, second, truncate_prompt_tokens=keep, param="text")
        pooling = PoolingParams(pooling="scores", normalize=False, num_first=item.num_first)
        found.append((item, pooling))
    return found


async def _encoded(vectors: Sequence[Vector], *, as_base64: bool) -> list[msgspec.Raw]:
    """Each vector as JSON: numbers, or base64 of little-endian float32 (EMB-1).

    Millions of numbers take seconds, in which others have their turn.
    """
    found = []
    num_values = 0
    for vector in vectors:
        value: object
        if as_base64:
            value = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        else:
            value = vector.tolist()
        found.append(msgspec.Raw(msgspec.json.encode(value)))
        num_values += len(vector)
        if num_values > _VALUES_AT_ONCE:
            num_values = 0
            await asyncio.sleep(0)
    return found
