"""A store in Redis."""

from kvcomm.errors import TierError
from kvcomm.tiers.store import ObjectStore, shown_url


def open_redis(url: str) -> ObjectStore:
    """Later."""
    raise TierError(f"{shown_url(url)}: Redis is not there yet")
