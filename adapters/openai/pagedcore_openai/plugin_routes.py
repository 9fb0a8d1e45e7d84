"""Routes that plugins add to the surface: behind the same gate, and never in the way of ours."""

import re
from typing import Any

import pluggy
from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute, Match, Route

from pagedcore.engine.client import EngineClient
from pagedcore.errors import PluginError
from pagedcore.plugins import origin

HOOK = "pagedcore_routes"


def add_plugin_routes(app: FastAPI, client: EngineClient, plugins: pluggy.PluginManager) -> None:
    """Add what the plugins bring, after all routes of ours.

    Raises PluginError, naming the plugin, for one that fails, adds anything but HTTP routes, or
    claims a path that is taken.
    """
    taken = list(app.routes)
    for plugin in getattr(plugins.hook, HOOK).get_hookimpls():
        router = APIRouter()
        given: dict[str, Any] = {"router": router, "client": client}
        remedy = f"Start with --disable-plugin {plugin.plugin_name}, or fix it."
        try:
            plugin.function(*(given[name] for name in plugin.argnames))
        except Exception as error:
            raise PluginError(
                f"the plugin {origin(plugin.plugin_name)} could not add its routes: "
                f"{type(error).__name__}: {error}. {remedy}"
            ) from error
        for route in router.routes:
            complaint = _complaint(route, taken)
            if complaint:
                raise PluginError(f"the plugin {origin(plugin.plugin_name)} {complaint}. {remedy}")
            taken.append(route)
        app.include_router(router)


def _complaint(route: BaseRoute, taken: list[BaseRoute]) -> str:
    """What is wrong with a new route, or ""."""
    if not isinstance(route, Route) or not route.methods:
        return f"adds {route!r:.80}, which is no HTTP route"
    for other in taken:
        if isinstance(other, Route) and (_answers(other, route) or _answers(route, other)):
            return f"adds the path {route.path}, which {other.path} has taken"
    return ""


def _answers(route: Route, other: Route) -> bool:
    """Whether a route answers an example of another's path, whatever the method."""
    path = re.sub(r"\{[^}]*\}", "example", other.path)
    scope = {"type": "http", "path": path, "method": "GET", "root_path": ""}
    return route.matches(scope)[0] is not Match.NONE
