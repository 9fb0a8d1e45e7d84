"""The OpenAI surface: an ASGI application over an engine's socket, and a bare server for it.

app.py          build_app: the routes
surface.py      Surface: what all requests of one front end share, from loading to draining
gate.py         Gate: keys, limits and deadlines, before a request is looked at
http_protocol.py  the same for bytes that are no request yet
body.py         JSON bodies, and the fields that have no effect
protocol.py     the fields of each request
prepare.py      a request into what the engine takes
answer.py       Answer: the choices of one request, from tokens to text
chat.py         the shapes of chat answers
completions.py  the shapes of completion answers
logprobs.py     the shapes of log-probabilities
event_stream.py server-sent events
errors.py       exceptions into OpenAI's error bodies
serve.py        the mount "asgi": uvicorn and an engine process
"""

from collections.abc import Callable, Mapping
from typing import Any

from pagedcore import hookimpl
from pagedcore.config import EngineConfig

pagedcore_requires = ">=1,<2"


@hookimpl
def pagedcore_servers() -> Mapping[str, Callable[[EngineConfig, Any], int]]:
    """Offer the bare server."""
    return {"asgi": _serve}


def _serve(config: EngineConfig, server: Any) -> int:
    from pagedcore_openai.serve import serve

    return serve(config, server)
