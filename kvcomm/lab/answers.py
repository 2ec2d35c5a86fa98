"""What answers are made of, for evaluations that look into them: choices, probabilities of tokens, names and limits.

`ANSWER` is the name of the segment that an answer becomes in a context; `MIN_CHUNK` the tokens of an open prompt below
which none is read beside who decodes.
"""

from __future__ import annotations

from kvcomm.engine.request import ANSWER
from kvcomm.engine.results import Choice
from kvcomm.engine.sampler import token_logprob
from kvcomm.engine.sampling import TokenLogprob
from kvcomm.engine.spare import MIN_CHUNK

__all__ = ["ANSWER", "MIN_CHUNK", "Choice", "TokenLogprob", "token_logprob"]
