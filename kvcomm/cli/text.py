"""Small pieces of output: foreign text made safe to print, ages, usages.

Names and answers come from files and models, so they may hold control characters; none of those reaches a
terminal.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcomm.engine.results import Usage

_KEPT_CONTROLS = "\n\t"
_AGES = (("d", 86_400), ("h", 3_600), ("min", 60))


def printable(text: str) -> str:
    """The text with every control character but newline and tab replaced by U+FFFD."""
    return "".join(char if char.isprintable() or char in _KEPT_CONTROLS else "\ufffd" for char in text)


def counted(number: int, word: str) -> str:
    """A number with its English word: "1 token", "2 tokens"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def age_of(created: str, *, now: datetime | None = None) -> str | None:
    """How long ago an ISO 8601 time was, in its largest unit; None if it is no such time.

    A time without a zone counts as UTC, one in the future as now.
    """
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    seconds = max(0, int(((now or datetime.now(UTC)) - moment).total_seconds()))
    for unit, length in _AGES:
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def usage_values(usage: Usage) -> dict[str, object]:
    """A usage as JSON values."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "exact_tokens": usage.exact_tokens,
        "aligned_tokens": usage.aligned_tokens,
        "computed_tokens": usage.computed_tokens,
        "read_along_tokens": usage.read_along_tokens,
        "generated_tokens": usage.generated_tokens,
        "guessed_tokens": usage.guessed_tokens,
        "queue_s": usage.queue_s,
        "ttft_s": usage.ttft_s,
        "total_s": usage.total_s,
        "decode_tokens_per_s": usage.decode_tokens_per_s,
        "reasons": dict(usage.reasons),
    }


def usage_line(usage: Usage) -> str:
    """A usage on one line."""
    return (
        f"{usage.prompt_tokens} prompt tokens: {usage.exact_tokens} from the cache, {usage.computed_tokens} computed; "
        f"{usage.generated_tokens} generated; first token after {usage.ttft_s:.3f} s, "
        f"then {usage.decode_tokens_per_s:.1f} tokens/s"
    )
