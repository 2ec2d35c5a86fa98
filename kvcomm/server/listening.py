"""The socket that a server listens on: bound before anything heavy is imported for it."""

from __future__ import annotations

import socket

from kvcomm.errors import InvalidRequest
from kvcomm.server.settings import ServerSettings


def bind(settings: ServerSettings) -> socket.socket:
    """A socket to listen on, so that a taken port is an error of one line, before a model is loaded for it.

    Raises:
        InvalidRequest: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol spelled out: asyncio only then switches off Nagle's algorithm, which costs 40 ms per answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        where = f"{settings.host}:{settings.port}"
        raise InvalidRequest(f"cannot listen on {where}: {error.strerror or error}; choose another --port") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """URL of a socket to listen on."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
