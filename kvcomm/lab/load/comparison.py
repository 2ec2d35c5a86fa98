"""What a server's figures are held against: the engine called directly, and transformers alone.

`measure_overhead` takes the time to the first token of the same chat twice, once through the server and once from an
engine in this process, in turn, each first every other time. The engine is given tokens: rendering, tokenizing and
everything else on the way is the server's. `StockLoop` answers chats one by one as a few lines with transformers do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from kvcomm.engine.engine import Engine
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import ServerError
from kvcomm.lab.load.client import ChatMessage, Client
from kvcomm.memory.segments import Segment
from kvcomm.model.loading import load_model

ONE_TOKEN = SamplingParams(max_new_tokens=1, temperature=0.0)

NUM_WARM = 2
"""Chats that fill the caches: the first one computes the shared beginning, the second one finds it."""

Chat = Sequence[ChatMessage]


class FirstTokenTimes(NamedTuple):
    """Seconds to the first token of one chat.

    Attributes:
        server_s: through the server, from sending to the first event.
        engine_s: of the engine in this process.
        inside_s: of the engine inside the server during that same request, as the server tells.
    """

    server_s: float
    engine_s: float
    inside_s: float


def measure_overhead(
    client: Client, engine: Engine, chats: Sequence[Chat], *, tell: Callable[[str], None]
) -> list[FirstTokenTimes]:
    """One pair for each chat behind the first `NUM_WARM`, which fill both caches and do not count.

    Raises:
        ServerError: the server did not answer one of them.
    """
    pairs = []
    for index, chat in enumerate(chats):
        prompt = engine.read_prompt([engine.segment(_rendered(engine.tokenizer, chat))], is_start=True)
        if index % 2:
            engine_s = _first_token_s(engine, prompt)
            server_s, inside_s = _through_server(client, chat)
        else:
            server_s, inside_s = _through_server(client, chat)
            engine_s = _first_token_s(engine, prompt)
        pairs.append(FirstTokenTimes(server_s, engine_s, inside_s))
        tell(f"pair {index + 1} of {len(chats)}")
    return pairs[NUM_WARM:]


class StockAnswer(NamedTuple):
    """An answer without its end token, the tokens of its prompt, and the seconds that it took."""

    text: str
    num_tokens: int
    num_prompt_tokens: int
    seconds: float


class StockLoop:
    """Transformers' own `generate`: one chat at a time, greedy, every prompt computed whole."""

    def __init__(self, model: str) -> None:
        """Load a model by packaged name, folder, GGUF file or hub id.

        Raises:
            KVCommError: see `load_model`.
        """
        loaded = load_model(model)
        self._model: Any = loaded.model
        self._tokenizer: Any = loaded.tokenizer

    def answer(self, chat: Chat, max_tokens: int) -> StockAnswer:
        """Answer one chat; rendering and tokenizing count."""
        start = time.perf_counter()
        text = _rendered(self._tokenizer, chat)
        inputs = self._tokenizer(text, return_tensors="pt", add_special_tokens=False).to(self._model.device)
        output = self._model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=self._tokenizer.eos_token_id
        )
        num_prompt_tokens = inputs["input_ids"].shape[1]
        new = output[0, num_prompt_tokens:]
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        seconds = time.perf_counter() - start
        special = torch.tensor(self._tokenizer.all_special_ids, device=new.device)
        return StockAnswer(text, int((~torch.isin(new, special)).sum()), num_prompt_tokens, seconds)


def _rendered(tokenizer: Any, chat: Chat) -> str:
    text: str = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
    return text


def _first_token_s(engine: Engine, prompt: tuple[Segment, ...]) -> float:
    start = time.perf_counter()
    engine.generate(prompt, ONE_TOKEN)
    return time.perf_counter() - start


def _through_server(client: Client, chat: Chat) -> tuple[float, float]:
    sample = client.send(chat, ONE_TOKEN.max_new_tokens)
    if sample.error is not None or not sample.events_s:
        raise ServerError(f"the server did not answer: {sample.error or 'the stream held no token'}")
    return sample.events_s[0], float(sample.usage["timings"]["ttft_s"])
