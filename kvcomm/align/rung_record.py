"""How a rung is written in files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kvcomm.align.ladder import Rung
from kvcomm.files.records import StrictRecord


class RungRecord(StrictRecord):
    """One rung."""

    estimator: str
    share: Annotated[float, Field(ge=0, le=1)]
    chooser: str

    @classmethod
    def of(cls, rung: Rung) -> RungRecord:
        """How a rung is written."""
        return cls(estimator=rung.estimator, share=rung.share, chooser=rung.chooser)

    @property
    def rung(self) -> Rung:
        """The rung."""
        return Rung(self.estimator, self.share, self.chooser)
