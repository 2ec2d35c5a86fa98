"""Published ways to move KV, as variants that the engine serves without a bound.

paper: KVCOMM's estimator (arXiv 2510.12872v2, Eq. 5-7), its entropy gate open as in its own timings; the gate does not
tell bad prompts from good ones. cacheblend: keys re-rotated, 15 % of the tokens recomputed, those whose KV in the
second layer is farthest off (arXiv 2405.16444). epic: keys re-rotated, the first 15 % of every segment recomputed
(arXiv 2410.15332, where it is a fixed number of tokens). rotate: keys re-rotated, nothing else.
"""

from __future__ import annotations

from kvcomm.lab.variant import Variant

METHODS = {
    "rotate": Variant("rotate"),
    "cacheblend": Variant("rotate", 0.15, "deviation"),
    "epic": Variant("rotate", 0.15, "head"),
    "paper": Variant("paper"),
}
