"""GET /openapi.json: what each route takes and answers, from the declarations that check it."""

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from pagedcore import __version__
from pagedcore_openai.errors import TYPES

_REF = "#/components/schemas/"
_WORK = (400, 404, 408, 413, 415, 422, 429, 500, 501, 503)
"""What routes that take a body may refuse it with."""

_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": sorted(set(TYPES.values()))},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}


_HEADERS = [
    {
        "name": "x-request-id",
        "in": "header",
        "schema": {"type": "string"},
        "description": "Names the request, if it matches [A-Za-z0-9._-]{1,128}: it is then part of "
        "the answer's id.",
    },
    {
        "name": "x-request-timeout",
        "in": "header",
        "schema": {"type": "string", "pattern": "^[0-9]{1,9}(\\.[0-9]{1,9})?$"},
        "description": "Seconds within which the answer must be complete; else 408, or a stream's "
        "error event, and the engine drops the request.",
    },
]


def describe(
    fields: type[BaseModel] | None = None,
    *,
    works: bool = False,
    streams: bool = False,
    refusals: Sequence[int] = (),
    media_type: str | None = "application/json",
) -> dict[str, Any]:
    """What `add_api_route` is told of a route, beside its path, methods and function.

    :param fields: the body's declaration.
    :param works: whether the route takes a body, and refuses it as inference routes do.
    :param streams: whether the answer may be an event stream.
    :param refusals: further statuses.
    :param media_type: of a good answer; None where it has no body.
    """
    good: dict[str, Any] = {"description": "Success"}
    if media_type is not None:
        good["content"] = {media_type: {"schema": {}}}
        if streams:
            good["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    statuses = {*(_WORK if works else ()), *refusals, 401, 431, 500, 503}
    about: dict[str, Any] = {"responses": {"200": good, **_refusals(statuses)}}
    if works:
        schema: dict[str, Any] = {"type": "object"} if fields is None else _ref(fields.__name__)
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        about |= {"requestBody": body, "parameters": _HEADERS}
    return {"response_model": None, "openapi_extra": {"about": about, "fields": fields}}


def not_built() -> dict[str, Any]:
    """The same for a route that only answers 501."""
    about = {"responses": _refusals({401, 431, 501})}
    return {"response_model": None, "openapi_extra": {"about": about, "fields": None}}


def document(app: FastAPI) -> dict[str, Any]:
    """The document of an application whose routes were added with `describe`."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {"Error": _ERROR}
    for route in app.routes:
        if not isinstance(route, APIRoute) or "about" not in (route.openapi_extra or {}):
            continue  # a plugin's
        assert route.openapi_extra is not None
        about, fields = route.openapi_extra["about"], route.openapi_extra["fields"]
        if fields is not None:
            schemas |= _schemas(fields)
        summary = (route.endpoint.__doc__ or "").strip().partition("\n")[0]
        in_path = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in route.param_convertors
        ]
        parameters = [*in_path, *about.get("parameters", ())]
        operation = {"summary": summary, **about, "parameters": parameters}
        for method in route.methods or ():
            paths.setdefault(route.path_format, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "pagedcore", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _refusals(statuses: Iterable[int]) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("Error")}}
    return {
        str(status): {"description": TYPES[status], "content": content}
        for status in sorted(statuses)
    }


def _schemas(fields: type[BaseModel]) -> dict[str, Any]:
    schema = fields.model_json_schema(ref_template=_REF + "{model}")
    inner: dict[str, Any] = schema.pop("$defs", {})
    return {fields.__name__: schema, **inner}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF + name}
