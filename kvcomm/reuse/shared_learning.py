"""What a tenant has learned about moving text, kept in a shared tier: banks, pairs of readers, what audits said.

It is one archive, as `kvcomm anchors export` writes it, so a calibration never comes apart from the anchors that it was
measured with. An engine that knows nothing of a tenant takes over what is there, and writes what it has learned now and
then and at its end. Of several engines that learn at once the one that knows most by then stays; merging is for whoever
runs several. All of it happens in the tier's thread.
"""

from __future__ import annotations

import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from threading import Lock

from kvcomm.align.archive import export_archive, import_archive
from kvcomm.align.profile_file import Profile
from kvcomm.errors import AnchorFileError
from kvcomm.reuse.parts import ReuseParts
from kvcomm.tiers.tier import Tier, TierMiss, TierSpace
from kvcomm.tiers.write_queue import WriteTask

logger = logging.getLogger("kvcomm.tiers")

NAME = "anchors"
EVERY_S = 60.0
"""Seconds between two looks at whether there is something new to write."""


class SharedLearning:
    """Takes what was learned from one tier, and gives it there. Safe to use from several threads."""

    def __init__(self, reuse: ReuseParts, tier: Tier | None) -> None:
        self._reuse = reuse
        self._tier = tier
        self._lock = Lock()
        self._spaces: dict[str, TierSpace] = {}  # by namespace
        self._shared: dict[str, int] = {}  # how much was known when it was last read or written
        self._due_s: dict[str, float] = {}

    def used(self, namespace: str, space: TierSpace) -> None:
        """A request of this namespace may move text: read what the tier has, the first time; write what is new."""
        now = time.monotonic()
        with self._lock:
            if self._tier is None or now < self._due_s.get(namespace, 0.0) or not self._tier.serves(space.tenant):
                return
            is_new = namespace not in self._due_s
            self._spaces[namespace], self._due_s[namespace] = space, now + EVERY_S
        self._queue(namespace, "read" if is_new else "write")

    def put(self, namespace: str, space: TierSpace) -> bool:
        """Write what is known; False: there is no tier, nothing is known, or it could not be written."""
        num_known = self._num_known(namespace)
        if self._tier is None or not num_known:
            return False
        with tempfile.TemporaryDirectory(prefix="kvcomm-") as root:
            folder, file = Path(root) / "anchors", Path(root) / "anchors.tar"
            self._reuse.save(folder, namespace)
            export_archive(folder, file)
            content = file.read_bytes()
        is_written = self._tier.put_blob(space, "reader", NAME, content)
        if is_written:
            with self._lock:
                self._shared[namespace] = num_known
        return is_written

    def get(self, namespace: str, space: TierSpace) -> Profile | None:
        """Take over what the tier has, in place of what is known of the same edges and readers; None: nothing.

        Raises:
            AnchorFileError: it is refused; see the subclasses.
        """
        content = TierMiss.ABSENT if self._tier is None else self._tier.get_blob(space, "reader", NAME)
        if isinstance(content, TierMiss):
            return None
        with tempfile.TemporaryDirectory(prefix="kvcomm-") as root:
            folder, file = Path(root) / "anchors", Path(root) / "anchors.tar"
            file.write_bytes(content)
            import_archive(file, folder)
            profile = self._reuse.load(folder, namespace)
        with self._lock:
            self._shared[namespace] = self._num_known(namespace)
        return profile

    def close(self) -> None:
        """Queue what was learned since it was last written."""
        for namespace in list(self._spaces):
            self._queue(namespace, "write")

    def _queue(self, namespace: str, what: str) -> None:
        assert self._tier is not None
        act = partial(self._read if what == "read" else self._write, namespace)
        self._tier.queue.add(WriteTask(f"{what} anchors {namespace}", 0, act, lambda: None))

    def _read(self, namespace: str) -> None:
        if self._num_known(namespace):
            return
        try:
            self.get(namespace, self._spaces[namespace])
        except AnchorFileError as error:
            logger.warning("what the tier has learned is not taken over: %s", error)

    def _write(self, namespace: str) -> None:
        if self._num_known(namespace) > self._shared.get(namespace, 0):
            self.put(namespace, self._spaces[namespace])

    def _num_known(self, namespace: str) -> int:
        """Anchor tokens and pairs; it grows with what is learned."""
        with self._reuse.lock:
            num_tokens = sum(bank.snapshot().num_tokens for bank in self._reuse.anchors.banks(namespace))
            return num_tokens + sum(len(pairs) for _, pairs in self._reuse.book.knowledge(namespace).readers)
