"""What engines learn about moving text, shared among replicas: each tells what it knows, and takes over what is better.

A replica's knowledge of a tenant is one archive of anchors under the replica's name, in versions. Nothing is mixed, see
`merging`: whoever takes readers over has their banks and pairs as one engine measured them. Replicas that only read
along stop telling, and their last word stays until its readers are known better. For a worker thread; errors are for
the log, as nobody waits for any of this.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from kvcomm.align.archive import export_archive, import_archive
from kvcomm.engine.engine import Engine
from kvcomm.errors import KVCommError
from kvcomm.integrations.ray.merging import CountedReader, cut_to_better
from kvcomm.integrations.ray.sealed import SealedObjects

logger = logging.getLogger("kvcomm.ray")

LEARNED = "learned"


class LearningExchange:
    """Tells and takes over, for one replica.

    Law: what was taken over counts as told, or two replicas would tell each other the same for ever.
    """

    def __init__(
        self, engine: Engine, objects: SealedObjects, replica: str, tenants: Callable[[], Iterable[str]]
    ) -> None:
        """`tenants`: names of all that have asked for something; what a salt divides is not shared."""
        self._engine = engine
        self._objects = objects
        self._replica = replica
        self._tenants = tenants
        self._told: dict[str, int] = {}  # tenant -> pairs
        self._seen: set[str] = set()
        self._version = 0

    def exchange(self) -> int:
        """Do both for every tenant; returns the number of readers that were taken over."""
        num_readers = 0
        for tenant in self._tenants():
            if not self._objects.serves(tenant):
                continue
            try:
                num_readers += self._take_over(tenant)
                self._tell(tenant)
            except (KVCommError, OSError) as error:
                logger.warning("what was learned is not shared now: %s", error)
        return num_readers

    def _tell(self, tenant: str) -> None:
        num_pairs = sum(each.num_pairs for each in self._known(tenant))
        if num_pairs <= self._told.get(tenant, 0):
            return
        self._version += 1
        folder = self._folder(tenant)
        name = f"{folder}{self._replica}-{self._version:010d}"
        with tempfile.TemporaryDirectory() as made:
            self._engine.reuse.save(Path(made, "anchors"), tenant=tenant)
            export_archive(Path(made, "anchors"), Path(made, "archive"))
            self._objects.put(tenant, name, Path(made, "archive").read_bytes())
        self._told[tenant] = num_pairs
        for each in self._objects.names(folder):
            if each.startswith(f"{folder}{self._replica}-") and each != name:
                self._objects.clear(each)

    def _take_over(self, tenant: str) -> int:
        folder = self._folder(tenant)
        own = f"{folder}{self._replica}-"
        names = [name for name in self._objects.names(folder) if not name.startswith(own) and name not in self._seen]
        num_readers = 0
        for name in names:
            self._seen.add(name)
            content = self._objects.get(tenant, name)
            if content is not None:
                num_readers += self._read(tenant, content)
        return num_readers

    def _read(self, tenant: str, content: bytes) -> int:
        with tempfile.TemporaryDirectory() as made:
            archive, whole, better = Path(made, "archive"), Path(made, "whole"), Path(made, "better")
            archive.write_bytes(content)
            import_archive(archive, whole)
            readers = cut_to_better(whole, self._known(tenant), better)
            if readers:
                self._engine.reuse.load(better, tenant=tenant)
                self._told[tenant] = sum(each.num_pairs for each in self._known(tenant))
        return len(readers)

    def _known(self, tenant: str) -> list[CountedReader]:
        return [CountedReader(each.reader, len(each.pairs)) for each in self._engine.reuse.readers(tenant)]

    def _folder(self, tenant: str) -> str:
        return self._objects.folder(tenant, LEARNED, self._engine.home(tenant))
