"""What is said about KV events: where they go, in which form, and whose blocks they are about.

Events carry tokens, and whoever can connect reads them. So a server without keys announces what its one tenant has, and
one with keys only the tenants that are named. Each of those has a salt that no other has: the blocks of one can never
be taken for another's, and a router that is told the salt (`cache_salt`, as with vLLM) finds them. One tenant may have
the empty salt, that of prompts of which a router knows the tokens only. What a request has salted itself is never
announced: its salt says that nobody should look for it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kvcomm.errors import InvalidRequest
from kvcomm.server.kv_events.blocks import DEFAULT_SEED

MAX_PORT = 65_535
ADDRESS = re.compile(r"ipc://\S+|tcp://\S+:(?P<port>\*|\d{1,5})")


def _address(url: str) -> str:
    found = ADDRESS.fullmatch(url)
    port = None if found is None else found["port"]
    if found is None or (port is not None and port != "*" and int(port) > MAX_PORT):
        raise ValueError("must be an address such as tcp://*:5557, tcp://HOST:5557 or ipc:///a/file")
    return url


Url = Annotated[str, AfterValidator(_address)]


def _apart(tenants: dict[str, str]) -> dict[str, str]:
    salts = list(tenants.values())
    for tenant, salt in tenants.items():
        if salts.count(salt) > 1:
            raise ValueError(
                f"must give each tenant a salt of its own, and that of {tenant!r}, {salt!r}, is another's too"
            )
    return tenants


class KVEventSettings(BaseModel):
    """KV events, as vLLM publishes them.

    Attributes:
        url: where to publish, such as tcp://*:5557; an address of another machine is connected to.
        topic: by default kv@HOST@MODEL, with this machine's name and what clients call the model.
        format: of events, as maps or, for what reads older ones, arrays.
        replay: where what was missed is sent again, such as tcp://*:5558; None: nowhere.
        block_size: in tokens, as readers expect it; the pool's pages are another matter.
        seed: before the first block: what vLLM has in PYTHONHASHSEED, where it has that.
        tenants: those announced besides the one there is without keys, and the salt of each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Url
    topic: str | None = None
    format: Literal["map", "array"] = "map"
    replay: Url | None = None
    block_size: Annotated[int, Field(ge=1)] = 16
    seed: str = DEFAULT_SEED
    tenants: Annotated[dict[str, str], AfterValidator(_apart)] = Field(default_factory=dict)

    def require_somebody(self, *, has_keys: bool) -> None:
        """Raises InvalidRequest where there are keys, and no tenant is named: nothing would ever be announced."""
        if has_keys and not self.tenants:
            raise InvalidRequest(
                "KV events carry tokens, so with keys only tenants that are named are announced, and none is: give "
                "--kv-events-tenant NAME for each, or NAME= for the one whose prompts routers know without a salt"
            )


def parse_tenants(texts: list[str]) -> dict[str, str]:
    """Tenants and their salts as the command line spells them: NAME, for the name as the salt, or NAME=SALT.

    Raises:
        InvalidRequest: no name, or one twice.
    """
    tenants: dict[str, str] = {}
    for text in texts:
        name, sign, salt = text.partition("=")
        if not name or name in tenants:
            raise InvalidRequest(f"--kv-events-tenant {text!r}: {'named twice' if name else 'no name'}")
        tenants[name] = salt if sign else name
    return tenants
