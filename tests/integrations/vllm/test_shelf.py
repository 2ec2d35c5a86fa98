"""Exact KV of vLLM's on a tier in a folder: whose it is, what is worth it, and that nothing is mixed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcomm.integrations.vllm.params import RequestParams
from kvcomm.integrations.vllm.preparation import KVLists
from kvcomm.integrations.vllm.shelf import ENGINE_PRODUCER, TierShelf
from kvcomm.memory.pool import LayerShape
from kvcomm.tiers.space import DEFAULT_TENANT
from kvcomm.tiers.tier import Tier, TierSpace

RUN, SECRET = 16, b"a secret of all who share the tier"
SPACE = TierSpace("namespace", "vllm-cpu/0.32.0", DEFAULT_TENANT, (LayerShape(2, 4, 4),) * 2, torch.float32, 1000)
TOKENS = tuple(range(100, 150))
NOBODY = RequestParams()


def kv(num_tokens: int, seed: int = 0) -> KVLists:
    random = torch.Generator().manual_seed(seed)

    def some() -> list[Tensor]:
        return [torch.randn(num_tokens, 2, 4, generator=random) for _ in range(2)]

    return some(), some()


def shelf(folder: Path, producer: str = SPACE.producer, *, also_from: tuple[str, ...] = ()) -> TierShelf:
    tier = Tier.open(str(folder), secret=SECRET, run_tokens=RUN)
    space = TierSpace(SPACE.namespace, producer, DEFAULT_TENANT, SPACE.shapes, SPACE.dtype, SPACE.vocab_size)
    return TierShelf(tier, space, also_from=also_from)


def put(into: TierShelf, found: KVLists, params: RequestParams = NOBODY) -> None:
    into.keep(TOKENS, found, 0, params)
    assert into.tier.queue.flush(30)


def test_whole_runs_come_back(tmp_path: Path) -> None:
    given = kv(50)
    put(shelf(tmp_path), given)
    found = shelf(tmp_path).find(TOKENS, NOBODY)
    assert found is not None
    for got, expected in zip((*found[0], *found[1]), (*given[0], *given[1]), strict=True):
        assert torch.equal(got, expected[:48])


def test_the_last_token_is_computed(tmp_path: Path) -> None:
    put(shelf(tmp_path), kv(50))
    found = shelf(tmp_path).find(TOKENS[:48], NOBODY)
    assert found is not None
    assert len(found[0][0]) == 32


def test_other_producers_are_read_only_where_they_agree(tmp_path: Path) -> None:
    put(shelf(tmp_path, ENGINE_PRODUCER), kv(50))
    assert shelf(tmp_path).find(TOKENS, NOBODY) is None
    assert shelf(tmp_path, also_from=(ENGINE_PRODUCER,)).find(TOKENS, NOBODY) is not None
    assert shelf(tmp_path, "vllm-cpu/0.33.0").find(TOKENS, NOBODY) is None


def test_tenants_are_apart(tmp_path: Path) -> None:
    put(shelf(tmp_path), kv(50), RequestParams(tenant="one"))
    assert shelf(tmp_path).find(TOKENS, RequestParams(tenant="other")) is None
    assert shelf(tmp_path).find(TOKENS, NOBODY) is None
    assert shelf(tmp_path).find(TOKENS, RequestParams(tenant="one")) is not None


def test_what_is_behind_loaded_tokens_is_added(tmp_path: Path) -> None:
    first = shelf(tmp_path)
    whole = kv(50)
    first.keep(TOKENS[:20], ([k[:20] for k in whole[0]], [v[:20] for v in whole[1]]), 0, NOBODY)
    assert first.tier.queue.flush(30)
    first.keep(TOKENS, ([k[16:] for k in whole[0]], [v[16:] for v in whole[1]]), 16, NOBODY)
    assert first.tier.queue.flush(30)
    found = shelf(tmp_path).find(TOKENS, NOBODY)
    assert found is not None
    assert torch.equal(found[1][1], whole[1][1][:48])


def test_runs_that_were_lost_meanwhile_are_not_made_up(tmp_path: Path) -> None:
    here = shelf(tmp_path)
    here.keep(TOKENS, kv(34), 16, NOBODY)  # of the first run nothing is there
    assert here.tier.queue.flush(30)
    assert shelf(tmp_path).find(TOKENS, NOBODY) is None


@pytest.mark.parametrize("token_s", [1e-12, 10.0])
def test_what_is_computed_faster_is_not_read(tmp_path: Path, token_s: float) -> None:
    put(shelf(tmp_path), kv(50))
    tier = Tier.open(str(tmp_path), secret=SECRET, run_tokens=RUN)
    here = TierShelf(tier, SPACE, token_s=lambda: token_s)
    assert (here.find(TOKENS, NOBODY) is not None) == (token_s > 1)
