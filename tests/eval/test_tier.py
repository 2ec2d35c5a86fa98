"""The evaluation of tiers tells whole, torn and wrong objects apart."""

from __future__ import annotations

from pathlib import Path

from eval.tier import VICTIM, VICTIM_RUNS, Kills, _read_all, _victim
from kvcomm.tiers.tier import Tier


def test_what_killed_writers_left_is_told_apart(tmp_path: Path) -> None:
    tier = Tier.open(str(tmp_path), run_tokens=4)
    token_ids, kv = _victim(tier, 1, 0)
    tier.put_prefix(VICTIM, token_ids, kv)
    assert _read_all(tier, 1, Kills()) == Kills(whole=VICTIM_RUNS)
    last = sorted((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)[
        -1
    ]
    last.chmod(0o600)
    last.write_bytes(last.read_bytes()[:-1])
    found = _read_all(tier, 1, Kills())
    assert (found.torn, found.wrong) == (1, 0)
    other_ids, other_kv = _victim(tier, 2, 0)
    tier.put_prefix(VICTIM, other_ids, other_kv._replace(keys=other_kv.values, values=other_kv.keys))
    assert _read_all(tier, 2, Kills()) == Kills(wrong=VICTIM_RUNS)
