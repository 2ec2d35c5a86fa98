"""What a report calls things, explained for somebody who has read nothing else."""

from __future__ import annotations

from eval.tasks import modes

MODES = {
    modes.DENSE: "Nothing is reused: every prompt token is computed. All other modes are held against its answers.",
    modes.EXACT: "What prompts begin with alike is computed once. Answers are those of dense.",
    modes.ALONG: "As exact; beside that, an agent that waits reads what others write while they write it. Answers are "
    "those of dense.",
    modes.KVCOMM: "Text that another prompt holds is moved from there and corrected, where examples say that the bound "
    "will be kept; the rest is computed.",
    modes.HEAL: "As kvcomm; beside that, what was moved is replaced by exact KV while the answer begins.",
    "rotate": "Text is moved and only its positions are corrected. No bound.",
    "cacheblend": "As rotate, and the 15 % of its tokens that are furthest off are computed (CacheBlend). No bound.",
    "epic": "As rotate, and the first tokens of every text, 15 % of all, are computed (EPIC). No bound.",
    "paper": "Text is moved and corrected as the publication of KVCOMM does it. No bound.",
    modes.STOCK: "Transformers alone: every prompt token is computed.",
    modes.STOCK_PREFIX: "Transformers alone, which keeps what stands before the first text that differs from question "
    "to question.",
}
"""By mode."""

TOPOLOGIES = {
    "full": "every agent reads the answers of all before it",
    "chain": "every agent reads the answer of the one before it",
    "debate": "agents answer, read each other's answers and answer again, and the referee reads those",
    "star": "nobody but the referee reads the answers of others",
}
"""By name: who reads whom."""
