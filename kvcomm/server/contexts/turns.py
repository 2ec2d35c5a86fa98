"""Turns: requests on a context.

A turn works on a fork. If its context is to keep what comes of it, the fork takes the context's place once the request
has succeeded: nobody ever sees a context half-way, and a request that fails or whose client is gone has never been.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvcomm.engine.context import Context
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.sampling import SamplingParams
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.server.contexts.conversation import Continued, Conversation, KeptConversation
from kvcomm.server.contexts.quota import ConversationQuota
from kvcomm.server.errors import ApiError

if TYPE_CHECKING:
    from kvcomm.server.contexts.registry import Node


class Turn:
    """One request on a context; made by `ContextRegistry.begin_turn`, or on an empty context that will become one.

    Attributes:
        work: what the request writes; the turn's to release unless it was kept.
        num_kept: tokens that were there before.
        prompt: what is new.
        conversation: of the context with this turn.
    """

    def __init__(
        self,
        work: Context,
        node: Node | None = None,
        *,
        before: KeptConversation | None = None,
        salt: str | None = None,
        quota: ConversationQuota | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        before, salt: without a node: the conversation that `work` holds, and what its namespace was opened with.
        quota: what conversations that are kept count towards; None: nothing.
        on_end: called when the node is not busy with this turn any more, if it was.
        """
        self.work = work
        self.num_kept = work.num_tokens
        self.prompt: tuple[Segment, ...] = ()
        self.conversation: KeptConversation | None = None
        self._before = before
        self._salt = salt
        self._quota = quota
        self._on_end = on_end
        self._node = node
        self._is_kept = False

    @property
    def before(self) -> Conversation | None:
        """The conversation that the turn continues; for a worker thread."""
        kept = self._before if self._node is None else self._node.conversation
        return None if kept is None else kept.read()

    @property
    def num_rendered(self) -> int:
        """Characters of that conversation, which is rendered again."""
        return 0 if self.before is None else len(self.before.rendered)

    @property
    def salt(self) -> str | None:
        """Of the context's namespace."""
        return self._salt if self._node is None else self._node.salt

    @property
    def extended_id(self) -> str | None:
        """Of the context that keeps what comes of it, if it began with one."""
        return None if self._node is None or self._node.turn is not self else self._node.id

    @property
    def path(self) -> tuple[Segment, ...]:
        """All that the answer will stand behind."""
        return (*self.work.segments, *self.prompt)

    @property
    def num_new(self) -> int:
        """Tokens that are new."""
        return sum(len(segment.token_ids) for segment in self.prompt)

    def put(self, new: Continued) -> None:
        """Say what is new.

        Raises:
            ApiError: 400 or 429 for a conversation that is too large to be kept.
        """
        is_kept = self._node is None or self._node.turn is self
        if self._quota is not None and is_kept:
            self._quota.hold(self, new.conversation)
        self.prompt = new.prompt
        self.conversation = new.conversation if is_kept else None

    def start(self, sampling: SamplingParams, policy: ReusePolicy) -> RequestHandle:
        """Submit the request.

        Raises:
            ApiError: 409 for an exact answer on KV that is not.
            KVCommError: the engine refuses it.
        """
        if policy.is_exact and self.work.fidelity is Fidelity.APPROXIMATE:
            message = "this context holds approximate KV; allow that in `reuse`, or make the context anew"
            raise ApiError(409, "context_approximate", message, param="context_id")
        self.work.policy = policy
        return self.work.submit(sampling, prompt=self.prompt or None)

    def keep(self) -> None:
        """The request has succeeded: what came of it takes the context's place, if it is to."""
        if self._node is not None and self._node.turn is self:
            self._node.take(self)
            self._is_kept = True
            self._on_end()

    def hand_over(self) -> Context:
        """Give what came of it to somebody else to release."""
        self._is_kept = True
        return self.work

    def end(self) -> None:
        """Give back what was not kept, once the request has ended. Idempotent."""
        if self._node is not None and self._node.turn is self:
            self._node.turn = None
            self._on_end()
        if self._quota is not None:
            self._quota.let_go(self)
        if not self._is_kept:
            self.work.release()
