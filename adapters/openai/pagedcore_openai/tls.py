"""What uvicorn must know to speak TLS."""

import ssl
from typing import Any

from pagedcore.errors import ConfigError
from pagedcore.server_config import ServerConfig


def tls_options(server: ServerConfig) -> dict[str, Any]:
    """Settings of uvicorn's; none without a certificate.

    Raises ConfigError for files that hold no certificate with its key.
    """
    if server.ssl_certfile is None:
        return {}
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"ssl_certfile and ssl_keyfile do not hold a certificate and its key: {error}"
        ) from None
    return {"ssl_certfile": server.ssl_certfile, "ssl_keyfile": server.ssl_keyfile}
