"""The contexts of a tenant as nodes, and turns: requests on them.

A turn works on a fork. If its context is to keep what comes of it, the fork takes the context's place once the request
has succeeded: nobody ever sees a context half-way, and a request that fails or whose client is gone has never been.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvcomm.engine.context import Context
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.sampling import SamplingParams
from kvcomm.memory.fidelity import Fidelity
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy
from kvcomm.server.contexts.conversation import Continued, Conversation, KeptConversation
from kvcomm.server.contexts.kept_response import KeptResponse
from kvcomm.server.contexts.quota import ConversationQuota
from kvcomm.server.errors import ApiError

NewId = Callable[[str | None], str]
"""Makes the id of a context, given that of the context it came from, if there is one."""


def new_id(parent: str | None = None) -> str:
    """An id that nobody guesses, whatever it came from."""
    return f"ctx_{secrets.token_hex(12)}"


@dataclass(eq=False)
class TenantContext:
    """A context of a tenant.

    Attributes:
        num_inherited: tokens it has from its parent.
        ttl_s, used_s: seconds it lives after its last use, unless it is pinned, and when that was.
        turn: the request that writes it now.
        response: that it ends with; it is not gone on with then, its forks are.
        is_spare: nobody asked for it, it is kept while there is room: others take its place.
    """

    context: Context
    name: str | None = None
    salt: str | None = None
    conversation: KeptConversation | None = None
    parent: TenantContext | None = None
    num_inherited: int = 0
    is_pinned: bool = False
    ttl_s: float = 0.0
    used_s: float = 0.0
    turn: Turn | None = None
    response: KeptResponse | None = None
    is_spare: bool = False
    id: str = field(default_factory=new_id)
    created: int = field(default_factory=lambda: int(time.time()))

    def take(self, turn: Turn) -> None:
        """Put what a turn made in this context's place."""
        replaced, self.context = self.context, turn.work
        self.conversation, self.turn = turn.conversation, None
        replaced.release()

    def fork(self) -> tuple[Context, KeptConversation | None]:
        """A context with all that is known at this moment, and its conversation."""
        if self.turn is None:
            return self.context.fork(), self.conversation
        context = self.turn.work.fork()
        has_new = context.num_tokens > self.turn.num_kept
        return context, self.turn.conversation if has_new else self.conversation

    def release(self) -> None:
        """Give all pages back; a request that writes it is cancelled and waited for. For a worker thread."""
        turn = self.turn  # the loop may end it meanwhile
        if turn is not None:
            turn.work.release()
        self.context.release()


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
        node: TenantContext | None = None,
        *,
        before: KeptConversation | None = None,
        salt: str | None = None,
        quota: ConversationQuota | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Make one.

        Args:
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
        """Salt of the context's namespace."""
        return self._salt if self._node is None else self._node.salt

    @property
    def extended_id(self) -> str | None:
        """Id of the context that keeps what comes of it, if it began with one."""
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
