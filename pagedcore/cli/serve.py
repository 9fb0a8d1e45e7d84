"""`pagedcore serve`: a model behind a server that a plugin mounts."""

import logging
import socket
from collections.abc import Mapping
from typing import Any

from pagedcore.cli.flags import command, engine_parameters, parameters, take
from pagedcore.config import DEFAULT_MODEL, EngineConfig
from pagedcore.errors import ConfigError
from pagedcore.logs import configure_logs
from pagedcore.plugins import choose, load_plugins
from pagedcore.presets import PRESETS
from pagedcore.server_config import ServerConfig

logger = logging.getLogger(__name__)


@command([*parameters(ServerConfig), *engine_parameters()])
def serve(model: str = DEFAULT_MODEL, *, server: str = "litserve", **options: Any) -> int:
    """Serve a model over HTTP.

    Parameters
    ----------
    model
        A folder, a GGUF file, `hf:org/name`, `modelscope:org/name`, `wheel:...` or an alias.
    server
        What serves: `litserve`, `asgi`, `pytriton`, or a plugin's.
    """
    server_config = ServerConfig(**take(options, ServerConfig))
    if server_config.log_format != "text":
        configure_logs(server_config.log_format)
    engine_config = EngineConfig.from_options(model=model, **options)
    _tell_preset(engine_config, options)
    execution = engine_config.execution
    plugins = load_plugins(execution.disable_plugin, execution.only_plugin)
    mount = choose(plugins, "pagedcore_servers", server)
    _check_address(server_config.host, server_config.port)
    status: int = mount(engine_config, server_config)
    return status


def _tell_preset(config: EngineConfig, given: Mapping[str, Any]) -> None:
    """Log what the preset sets, and what flags set in its place."""
    name = config.scheduler.preset
    settings = PRESETS[name].settings
    told = [
        f"{key}={given[key]} (given)" if given.get(key) is not None else f"{key}={value}"
        for key, value in settings.items()
    ]
    logger.info("preset %s: %s", name, ", ".join(told) or PRESETS[name].about)


def listen_error(host: str, port: int) -> str | None:
    """Why one cannot listen on an address, in the system's words; None where one can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _check_address(host: str, port: int) -> None:
    """Raise ConfigError for an address that cannot be listened on, before a model is loaded."""
    error = listen_error(host, port)
    if error is not None:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error}. "
            "Choose another --host or --port, or stop what listens there."
        )
