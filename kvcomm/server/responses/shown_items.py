"""The items that a stored response answers, page by page, as the API tells them."""

from __future__ import annotations

from typing import Any, Literal

from kvcomm.server.errors import ApiError
from kvcomm.server.responses.keeping import Stored
from kvcomm.server.responses.translation import SentItem
from kvcomm.server.schemas.response_items import SentCall, SentCallOutput, SentMessage
from kvcomm.server.schemas.responses import ItemList


def page_of(stored: Stored, *, limit: int, order: Literal["asc", "desc"], after: str | None) -> ItemList:
    """A page of a response's input items; `after`: the last id of the page before.

    Raises:
        ApiError: 404 for an id that is none of theirs.
    """
    shown = [_shown(item, f"{stored.node.id}_{index}") for index, item in enumerate(stored.input_items)]
    if order == "desc":
        shown.reverse()
    if after is not None:
        ids = [item["id"] for item in shown]
        if after not in ids:
            raise ApiError(404, "item_not_found", f"there is no item {after!r} in this response", param="after")
        shown = shown[ids.index(after) + 1 :]
    page = shown[:limit]
    return ItemList(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=len(page) < len(shown),
    )


def _shown(item: SentItem, place: str) -> dict[str, Any]:
    """An item with everything that the API's own lists say; `place` makes up for an id that its client did not give."""
    values = item.model_dump(by_alias=True, exclude_none=True, mode="json")
    prefix = "fc" if isinstance(item, SentCall | SentCallOutput) else "msg" if isinstance(item, SentMessage) else "rs"
    values = {"id": f"{prefix}_{place.removeprefix('ctx_')}", "status": "completed", **values}
    if isinstance(item, SentMessage) and isinstance(item.content, str):
        said = {"text": item.content}
        is_answer = item.role == "assistant"
        part = {"type": "output_text", "annotations": [], **said} if is_answer else {"type": "input_text", **said}
        values["content"] = [part]
    return values
