"""What the conversations of one tenant's contexts take beside their KV: messages, tools, and the text made of them.

A few tokens can have megabytes of them, where a template shows little of what it is given. Each is counted once, as
often as forks share it, from the moment a request brings it until nobody holds it. Responses that are kept with
contexts count, too. Safe to use from several threads.
"""

from __future__ import annotations

import threading
from typing import Protocol

from kvcomm.server.errors import ApiError
from kvcomm.server.settings import ServerSettings


class Retained(Protocol):
    """What takes room: a conversation, or a response."""

    @property
    def num_bytes(self) -> int: ...


class ConversationQuota:
    """Who holds which conversation: a context, or the request that will become one or extend one."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._held: dict[object, Retained] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all that are held."""
        with self._lock:
            return self._sum()

    def hold(self, holder: object, conversation: Retained | None) -> None:
        """Let a request hold a conversation in place of what it held.

        Raises:
            ApiError: 400 when it is larger than one may be, 429 when all together would be; it holds nothing new then.
        """
        with self._lock:
            if conversation is not None:
                self._require_room(conversation)
            self._put(holder, conversation)

    def keep(self, holder: object, conversation: Retained | None) -> None:
        """The same for what somebody holds already, as a fork's parent or a context's request does."""
        with self._lock:
            self._put(holder, conversation)

    def let_go(self, holder: object) -> None:
        """The holder is no more, if it ever held anything."""
        self.keep(holder, None)

    def _put(self, holder: object, conversation: Retained | None) -> None:
        self._held.pop(holder, None)
        if conversation is not None:
            self._held[holder] = conversation

    def _sum(self) -> int:
        return sum(each.num_bytes for each in set(self._held.values()))

    def _require_room(self, conversation: Retained) -> None:
        num_bytes, largest = conversation.num_bytes, self._settings.max_conversation_bytes
        if num_bytes > largest:
            message = (
                f"messages and tools of this context would take {num_bytes} bytes, and one context may keep "
                f"{largest}; send them without a context, or as text"
            )
            raise ApiError(400, "conversation_too_large", message, param="messages")
        held, most = self._sum(), self._settings.max_kept_bytes
        if held + num_bytes > most:
            message = (
                f"messages and tools of this tenant's contexts take {held} of at most {most} bytes, and these would "
                f"take {num_bytes} more; delete contexts, or let some expire"
            )
            retry_after_s = self._settings.retry_after_s
            raise ApiError(429, "quota_exceeded", message, param="messages", retry_after_s=retry_after_s)
