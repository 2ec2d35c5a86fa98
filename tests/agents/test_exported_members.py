"""What kvcomm.agents offers: every name exists, is listed once and in order."""

from __future__ import annotations

import kvcomm.agents


def test_exported_members() -> None:
    names = kvcomm.agents.__all__
    assert names == sorted(set(names))
    assert [name for name in names if not hasattr(kvcomm.agents, name)] == []
