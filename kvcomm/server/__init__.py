"""The HTTP server: an OpenAI-compatible surface over one engine, for many tenants.

Every surface (chat, completions, models, health, metrics, admin) is a small file with a router of its own; `app.py`
puts them together. What they share stands in `state.py`. Needs the extra `server`; nothing outside this package and
`kvcomm serve` imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm.starting import lazily

if TYPE_CHECKING:
    from kvcomm.server.app import make_app
    from kvcomm.server.keys import Role, add_key, remove_key
    from kvcomm.server.listening import bind
    from kvcomm.server.running import make_server
    from kvcomm.server.settings import ServerSettings

__all__ = [
    "Role",
    "ServerSettings",
    "add_key",
    "bind",
    "make_app",
    "make_server",
    "remove_key",
]

_HOMES = {
    "Role": "kvcomm.server.keys",
    "ServerSettings": "kvcomm.server.settings",
    "add_key": "kvcomm.server.keys",
    "bind": "kvcomm.server.listening",
    "make_app": "kvcomm.server.app",
    "make_server": "kvcomm.server.running",
    "remove_key": "kvcomm.server.keys",
}

__getattr__ = lazily(__name__, _HOMES)
