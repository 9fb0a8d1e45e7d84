"""Exceptions into the error bodies that OpenAI's clients understand (semantics 5.4)."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from pagedcore.errors import EngineDeadError, MissingError, OverloadedError, RequestError

MAX_MESSAGE_BYTES = 2048
"""Longest message of an error (ERR-3)."""

TYPES = {
    400: "BadRequestError",
    401: "authentication_error",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    431: "RequestHeaderFieldsTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
"""The `type` of each status (ERR-2)."""


class ApiError(Exception):
    """An answer that is an error, with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON of ERR-1, in ASCII: a message may repeat what is no valid text."""
        message = str(self).encode(errors="backslashreplace")[:MAX_MESSAGE_BYTES]
        error: dict[str, Any] = {
            "message": message.decode(errors="ignore"),
            "type": TYPES.get(self.status, "InternalServerError"),
            "param": self.param,
            "code": self.status,
        }
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """As an answer."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def as_api_error(error: Exception, *, admitted: bool = False) -> ApiError:
    """What a client is told of an exception; of an unexpected one, nothing but that it happened.

    `admitted` tells that the engine had taken the request: its death is a failure then, and no
    reason to ask again elsewhere.
    """
    match error:
        case ApiError():
            return error
        case MissingError():
            return ApiError(404, str(error), error.param)
        case RequestError():
            return ApiError(400, str(error), error.param)
        case ValidationError():
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            field = str(first["loc"][0]) if first["loc"] else None
            return ApiError(400, f"{field}: {first['msg']}", field)
        case OverloadedError():
            wait = str(min(60, max(1, error.retry_after_s)))
            return ApiError(503, str(error), headers={"retry-after": wait})
        case EngineDeadError():
            return ApiError(500 if admitted else 503, f"the engine has failed: {error}")
        case _:
            return ApiError(500, "the server failed on this request; its log says why")
