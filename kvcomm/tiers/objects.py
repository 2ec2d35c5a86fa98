"""A store in a bucket: S3 and what speaks its protocol, Google Cloud Storage, Azure; through `obstore`.

Credentials, region and endpoint come from the environment, as the clouds' own tools read it, or from the URL's query:
`s3://bucket/prefix?endpoint=http://localhost:9000&region=us-east-1`. Whether the bucket is there and may be read is
found out when it is opened. A bucket does not say when an object was used; the janitor goes by when it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from kvcomm.errors import MissingExtra, ObjectMissing, StoreFailed, TierError
from kvcomm.tiers.keys import ROOT
from kvcomm.tiers.store import ObjectStore, StoredObject, is_safe, safe_key, safe_prefix, shown_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig
    from obstore.store import ObjectStore as Bucket

CONNECT_S, REQUEST_S, RETRY_S = 5, 30, 10
MAX_SHOWN = 200
MAX_RETRIES = 2
VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
METADATA_SERVICE = "169.254.169.254"
"""Where virtual machines find their credentials; asked where the environment has none."""


class BucketStore:
    """Objects of a bucket; see `ObjectStore` for what each method promises."""

    def __init__(self, kind: str, url: str, bucket: Bucket) -> None:
        """`bucket`: with the prefix of the URL."""
        self.kind = kind
        self.url = url
        self._bucket = bucket

    def get(self, key: str) -> memoryview:
        """See `ObjectStore`."""
        import obstore

        with self._asking("read", safe_key(key)):
            # Copied, as torch wants bytes that may be written.
            return memoryview(bytearray(obstore.get(self._bucket, key).bytes()))

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """See `ObjectStore`."""
        import obstore

        with self._asking("read", safe_key(key)):
            return memoryview(bytearray(obstore.get_range(self._bucket, key, start=start, length=length)))

    def put_once(self, key: str, parts: Sequence[memoryview | bytes]) -> bool:
        """See `ObjectStore`."""
        import obstore

        try:
            with self._asking("written", safe_key(key)):
                obstore.put(self._bucket, key, b"".join(parts), mode="create", use_multipart=False)
        except FileExistsError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See `ObjectStore`."""
        import obstore

        with self._asking("listed", safe_prefix(prefix)):
            for batch in obstore.list(self._bucket, prefix or None):
                for each in batch:
                    if is_safe(each["path"]):
                        written_s = each["last_modified"].timestamp()
                        yield StoredObject(each["path"], each["size"], written_s, written_s)

    def delete(self, key: str) -> None:
        """See `ObjectStore`."""
        import obstore

        try:
            with self._asking("removed", safe_key(key)):
                obstore.delete(self._bucket, key)
        except ObjectMissing:
            return

    def sweep(self) -> int:
        """A bucket shows only what is whole; what was sent in vain it forgets by itself."""
        return 0

    def close(self) -> None:
        """Connections end with the last reference."""

    @contextmanager
    def _asking(self, done: str, key: str) -> Iterator[None]:
        from obstore.exceptions import AlreadyExistsError, BaseError

        try:
            yield
        except AlreadyExistsError as error:
            raise FileExistsError(key) from error
        except FileNotFoundError as error:
            raise ObjectMissing(f"there is no {key} in {self.url}") from error
        except (BaseError, OSError, ValueError) as error:
            raise StoreFailed(f"{key or 'it'} cannot be {done} in {self.url}: {_reason(error)}") from error


def open_bucket(url: str) -> ObjectStore:
    """The store in a bucket.

    Raises:
        TierError: no such bucket, no credentials, no right to list it, or a setting that is not known.
        MissingExtra: obstore is not installed.
    """
    try:
        from obstore import store as buckets
        from obstore.exceptions import BaseError
    except ImportError as error:
        raise MissingExtra(f"{shown_url(url)} needs obstore: pip install 'kvcomm[tiers]'") from error
    parts = urlsplit(url)
    kind, shown = parts.scheme.lower(), shown_url(url)
    if not parts.netloc:
        raise TierError(f"{shown} names no bucket; write {kind}://bucket/prefix")
    try:
        opened: Any = buckets.from_url  # its types want to know every setting beforehand
        settings: dict[str, Any] = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        bucket = opened(
            parts._replace(query="", fragment="").geturl(),
            config=settings,
            client_options=_client(settings),
            retry_config=_retries(),
        )
    except (BaseError, OSError, ValueError, TypeError) as error:
        raise TierError(f"{shown} cannot be opened: {_reason(error)}") from error
    found = BucketStore(kind, shown, bucket)
    try:
        next(found.list(ROOT), None)
    except (StoreFailed, ObjectMissing) as error:
        raise TierError(f"{shown} cannot be used as a tier: {_hint(kind, error)}") from error
    return found


def _client(settings: dict[str, Any]) -> ClientConfig:
    """Plain http only where the endpoint is given so."""
    endpoint = next((value for name, value in settings.items() if name.lower().endswith("endpoint")), "")
    is_plain = str(endpoint).lower().startswith("http://") or str(settings.pop("allow_http", "")).lower() == "true"
    return {
        "allow_http": is_plain,
        "connect_timeout": timedelta(seconds=CONNECT_S),
        "timeout": timedelta(seconds=REQUEST_S),
    }


def _retries() -> RetryConfig:
    return {"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)}


def _hint(kind: str, error: Exception) -> str:
    """What to do about a bucket that cannot be listed."""
    cause = str(error.__cause__)
    if METADATA_SERVICE in cause or "credential" in cause.lower():
        return f"there are no credentials; set {VARIABLES[kind]}"
    name = type(error.__cause__).__name__
    if name in ("PermissionDeniedError", "UnauthenticatedError"):
        return f"the credentials do not let it be listed; look at {VARIABLES[kind]} ({_reason(error.__cause__)})"
    if isinstance(error, ObjectMissing) or "404 Not Found" in cause:
        return "there is no such bucket; is it misspelt?"
    return _reason(error.__cause__)


def _reason(error: BaseException | None) -> str:
    """The first line of what obstore says, which goes on to print its structures."""
    text = " ".join(str(error).split("Debug source:")[0].split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
