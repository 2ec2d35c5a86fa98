"""Whether kvcomm holds what it promises for a family of models, found out on a tiny one with random weights.

Answers are compared with stock `generate`, token by token: computed cold, from the cache, and in forks. Where keys may
be moved, those of the first layer are turned to another place and compared with what the model computes there (they
depend on token and place only), and a text is served that was moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from kvcomm.align.ladder import Rung
from kvcomm.config import EngineConfig
from kvcomm.engine.engine import Engine
from kvcomm.errors import UnsupportedModel
from kvcomm.memory.segments import Segment
from kvcomm.model.families import families, random_model, tiny_config
from kvcomm.model.geometry import ModelGeometry
from kvcomm.model.progress import quiet_transformers
from kvcomm.model.rope import rotate

CONFIG = EngineConfig(pool_tokens=1024, learning_share=0.0)
NUM_PROMPT, NUM_NEW = 70, 6
"""Tokens: of a prompt that fills several pages and is longer than the windows; of an answer."""

MAX_PARAMETERS = 20_000_000
MAX_REASON = 120
"""Characters of what another library says."""

FROM, TO = 3, 90
"""Places between which keys are moved."""

KEY_TOLERANCE = 1e-4
"""Largest error of a moved key, relative to the largest key."""

Ids = tuple[int, ...]


class FamilyOutcome(StrEnum):
    """What holds for a family."""

    WORKS = "works"
    EXACT_ONLY = "exact only"
    REFUSED = "refused"
    WRONG = "wrong"
    NOT_TRIED = "not tried"


@dataclass(frozen=True)
class FamilyRow:
    """What was found out about a family.

    Attributes:
        family: the `model_type` of its configs.
        model: class of its models.
        attention: what its layers see, and how they score it; empty where that is not known.
        reason: why not more, in one line; empty where everything works.
    """

    family: str
    model: str
    outcome: FamilyOutcome
    attention: str = ""
    reason: str = ""


def try_family(name: str) -> FamilyRow:
    """Make a tiny model of a family and try everything on it; a second or less."""
    model_name = families()[name]
    with quiet_transformers():
        try:
            config = tiny_config(name)
            with torch.device("meta"):
                size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
            if size > MAX_PARAMETERS:
                return FamilyRow(
                    name, model_name, FamilyOutcome.NOT_TRIED, reason=f"a tiny one has {size:,} parameters"
                )
            model = random_model(config)
        except Exception as error:  # whatever a family's own code raises
            line = shorten(str(error), MAX_REASON, placeholder=" ...")
            reason = f"no tiny model of it runs ({type(error).__name__}: {line})"
            return FamilyRow(name, model_name, FamilyOutcome.NOT_TRIED, reason=reason)
        return try_model(name, model)


def try_model(name: str, model: PreTrainedModel) -> FamilyRow:
    """Try everything on a model, whose answers have no end from then on."""
    model_name = type(model).__name__
    model.generation_config.eos_token_id = None
    try:
        engine = Engine(model, byte_tokenizer(), config=CONFIG, prior=None)
    except UnsupportedModel as refusal:
        reason = str(refusal).removeprefix(f"{model_name} is not supported: ")
        return FamilyRow(name, model_name, FamilyOutcome.REFUSED, reason=reason)
    with engine:
        attention = seen_by(engine.geometry)
        wrong = [what for what, holds in CHECKS.items() if not holds(engine)]
        immovable = engine.geometry.immovable
        if immovable is None:
            wrong += [what for what, holds in MOVES.items() if not holds(engine)]
    if wrong:
        return FamilyRow(name, model_name, FamilyOutcome.WRONG, attention, f"not as stock: {', '.join(wrong)}")
    if immovable is not None:
        return FamilyRow(name, model_name, FamilyOutcome.EXACT_ONLY, attention, immovable)
    return FamilyRow(name, model_name, FamilyOutcome.WORKS, attention)


def seen_by(geometry: ModelGeometry) -> str:
    """What the layers of a model see, and how they score it, in words."""
    windows = {layer.sliding_window is not None for layer in geometry.layers}
    words = [{(False,): "full", (True,): "windows", (False, True): "windows and full"}[tuple(sorted(windows))]]
    if any(layer.has_sinks for layer in geometry.layers):
        words.append("sinks")
    if any(layer.softcap is not None for layer in geometry.layers):
        words.append("capped scores")
    return ", ".join(words)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _ids(num: int, seed: int = 0) -> Ids:
    # Not the first ones, which some families treat in a way of their own.
    return tuple(np.random.default_rng(seed).integers(3, 250, num).tolist())


def _stock(engine: Engine, ids: Ids) -> Ids:
    given = torch.tensor([ids], device=engine.model.device)
    model: Any = engine.model  # transformers types none of its mixins
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0
    )
    assert isinstance(out, Tensor)
    return tuple(out[0, len(ids) :].tolist())


def _answers_cold(engine: Engine) -> bool:
    ids = _ids(NUM_PROMPT)
    cold = engine.generate(ids, max_new_tokens=NUM_NEW, temperature=0.0)
    return cold.usage.exact_tokens == 0 and cold.token_ids == _stock(engine, ids)


def _answers_from_the_cache(engine: Engine) -> bool:
    """The prompt of the cold answer again, and one that departs from it."""
    again = _ids(NUM_PROMPT)
    for ids in (again, again[:50] + _ids(20, seed=1)):
        hit = engine.generate(ids, max_new_tokens=NUM_NEW, temperature=0.0)
        if hit.usage.exact_tokens == 0 or hit.token_ids != _stock(engine, ids):
            return False
    return True


def _answers_in_forks(engine: Engine) -> bool:
    past = _ids(40, seed=2)
    context = engine.context(past)
    for seed in (3, 4):
        more = _ids(9, seed=seed)
        with context.fork() as fork:
            found = fork.extend(more).generate(max_new_tokens=NUM_NEW, temperature=0.0)
        if found.token_ids != _stock(engine, past + more):
            return False
    context.release()
    return True


def _turns_keys(engine: Engine) -> bool:
    here, there = (_first_keys(engine.model, _ids(8, seed=5), place) for place in (FROM, TO))
    rope = engine.geometry.layers[0].rope
    moved = here if rope is None else rotate(here, TO - FROM, rope)
    return float((moved - there).abs().max()) <= KEY_TOLERANCE * float(there.abs().max())


def _first_keys(model: PreTrainedModel, ids: Sequence[int], first: int) -> Tensor:
    """Keys of the first layer, as the model itself caches them."""
    cache = DynamicCache()
    place = torch.arange(first, first + len(ids))[None]
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), position_ids=place, past_key_values=cache, use_cache=True)
    layer: Any = cache.layers[0]
    keys: Tensor = layer.keys
    return keys


def _serves_moved_text(engine: Engine) -> bool:
    text, end = Segment(_ids(30, seed=6), "text"), Segment(_ids(5, seed=7))
    for role, rung in ((_ids(20, seed=8), None), (_ids(33, seed=9), Rung("rotate"))):
        prompt = [Segment(role), text, end]
        served = engine.generate(prompt, max_new_tokens=NUM_NEW, temperature=0.0, rung=rung)
    return served.usage.aligned_tokens == len(text.token_ids)


FamilyCheck = Callable[[Engine], bool]

CHECKS: dict[str, FamilyCheck] = {
    "a cold answer": _answers_cold,
    "an answer from the cache": _answers_from_the_cache,
    "answers in forks": _answers_in_forks,
}

MOVES: dict[str, FamilyCheck] = {"keys at another place": _turns_keys, "a moved text": _serves_moved_text}
