"""`GET /ui`, and `/` which leads there: the dashboard, one self-contained page without a byte of data in it.

The page asks `/v1/stats`, `/v1/cache/tree` and `/v1/contexts` for the caller's own numbers, with a key where the server
has keys. Its style and script stand inside it and are allowed by their hashes alone: nothing is loaded from anywhere,
nothing inserted can run, no other site can frame it.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from string import Template
from typing import NamedTuple

from fastapi import APIRouter
from starlette.responses import HTMLResponse, RedirectResponse

from kvcomm.server.errors import documented

SCRIPTS = ("dom.js", "server.js", "charts.js", "tree.js", "tables.js", "trial.js", "app.js")
"""In the order in which they stand in the page: each uses what stands above it."""


class Page(NamedTuple):
    """The page, and the policy that browsers enforce on it."""

    html: str
    policy: str


def assemble() -> Page:
    """Put the page together from its parts in this package."""
    folder = files("kvcomm.server") / "page"

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    style, script = read("style.css"), "\n".join(read(name) for name in SCRIPTS)
    policy = {
        "default-src": "'none'",
        "style-src": _source(style),
        "script-src": _source(script),
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    html = Template(read("page.html")).substitute(style=style, script=script)
    return Page(html, "; ".join(f"{name} {value}" for name, value in policy.items()))


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE = assemble()
HEADERS = {
    "content-security-policy": PAGE.policy,
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

router = APIRouter(tags=["insight"])


@router.get("/", include_in_schema=False)
async def front_door() -> RedirectResponse:
    """Whoever opens the server's address in a browser gets the page."""
    return RedirectResponse("/ui")


@router.get("/ui", operation_id="dashboard", response_class=HTMLResponse, responses=documented(500))
async def dashboard() -> HTMLResponse:
    """A page that shows what is cached and why, and lets you try requests."""
    return HTMLResponse(PAGE.html, headers=HEADERS)
