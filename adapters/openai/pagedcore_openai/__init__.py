"""The OpenAI surface: an ASGI application over an engine's socket, and a bare server for it.

app.py               build_app: the routes
surface.py           Surface: what all requests of one front end share, from loading to draining
gate.py              Gate: keys, limits and deadlines, before a request is looked at
http_protocol.py     the same for bytes that are no request yet
protocol.py          the fields of each request; body.py reads them, openapi.py tells of them
intake.py            Intake: what every inference route does first
prepare.py           a request into what the engine takes; bounded_inputs.py refuses what cannot fit
answer.py            Answer: the choices of one request, from tokens to text
prompt_answer.py     those of one prompt; pieces.py has what is new of a choice
endpoints.py         chat, completions, models, tokens
vectors.py           embeddings, scores, ranks; vector_protocol.py and vector_answer.py do for them
                     what protocol.py and answer.py do for text
chat.py              the shapes of chat answers; completions.py, logprobs.py those of others
event_stream.py      server-sent events
responses.py         /v1/responses; response_*.py are its input, shapes and store
probes.py            health, load and /metrics
metrics.py           the page of /metrics; counters.py and timing.py are what fills it
tracing.py           a span per request, where that is asked for; request_trace.py is what it tells
errors.py            exceptions into OpenAI's error bodies
plugin_routes.py     what plugins add
unbuilt.py           routes that say what they are not, and those that change the server
chat.html            the page at /
serve.py             the mount "asgi": uvicorn and an engine process that supervisor.py keeps alive
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
