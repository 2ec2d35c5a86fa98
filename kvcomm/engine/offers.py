"""What others may have of the KV that requests compute: prefixes in the tree, renditions of segments, and lessons.

Nothing is offered before a close look at whether the model still has the weights that the request was made for.
"""

from __future__ import annotations

import logging
import time

from kvcomm.config import EngineConfig
from kvcomm.engine.request import ANSWER, Request
from kvcomm.engine.tiering import Tiering
from kvcomm.memory.memory import Memory
from kvcomm.memory.segments import Segment
from kvcomm.memory.sequences import KVSequence
from kvcomm.model.live import LiveWeights, Weights
from kvcomm.reuse.learner import Learner
from kvcomm.reuse.planner import Planner

logger = logging.getLogger("kvcomm.engine")


class Offers:
    """Gives computed KV to tree, tier, planner and learner of one engine. Called under its lock.

    Attributes:
        looked_at: digests of weights that were looked at closely since the model last ran, or may have been changed.
            Whoever lets it run clears this.
    """

    def __init__(
        self,
        config: EngineConfig,
        memory: Memory,
        live: LiveWeights,
        *,
        planner: Planner,
        learner: Learner,
        tiering: Tiering,
    ) -> None:
        self._is_on = config.cache
        self._page_size = memory.pool.page_size
        self._tree = memory.tree
        self._live = live
        self._planner = planner
        self._learner = learner
        self._tiering = tiering
        self.looked_at: set[str] = set()

    def require_weights(self, weights: Weights) -> None:
        """Before anything computed is offered: look closely whether the weights are still there.

        Raises:
            WeightsChanged, UnsupportedModel: they are not.
        """
        if weights.digest not in self.looked_at:
            self._live.require(weights, closely=True)
            self.looked_at.add(weights.digest)

    def remember(self, request: Request, sequence: KVSequence, *, whole: bool) -> None:
        """Put computed exact tokens into the tree; the last, partly filled page only if nobody writes on in it."""
        if not self._is_on:
            return
        is_whole = whole and sequence.num_exact == sequence.num_computed
        num_tokens = sequence.num_exact if is_whole else sequence.num_exact // self._page_size * self._page_size
        if num_tokens:
            pages = sequence.pages[: -(-num_tokens // self._page_size)]
            self._tree.insert(request.namespace, sequence.token_ids[:num_tokens], pages)
            self._tiering.remember(request, sequence, num_tokens, pages)

    def publish(self, request: Request) -> None:
        """Let other contexts move what this one has computed so far: prompt, and behind it the first answer."""
        if not self._is_on:
            return
        kept = () if request.active_branches else request.branches[0].detokenizer.answer_ids
        answer = (Segment(kept, ANSWER),) if kept else ()
        segments = (*request.segments, *answer)
        if any(segment.name is not None for segment in segments):
            if request.published_s is None:
                request.published_s = time.monotonic()
            self._planner.publish(request, segments)

    def healed(self, request: Request) -> None:
        """All KV of a request is exact from now on: let others have that instead of what they were given."""
        self.remember(request, request.sequence, whole=False)
        if self._is_on:
            self._planner.replace(request, request.segments)

    def learn_from(self, request: Request) -> None:
        """Let the learner have what its policy allows, before its pages are returned."""
        try:
            self._learner.after(request)
        except Exception:  # the answer is there, whether or not anything can be learned from it
            logger.exception("nothing is learned from request %d", request.request_id)
