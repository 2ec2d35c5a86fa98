"""Stand-ins for an engine and its contexts: deterministic, without a model, and counting what is open."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvcomm.engine.encoding import TextEncoder
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.results import Choice, Chunk, Completion, Usage
from kvcomm.engine.sampling import SamplingParams
from kvcomm.errors import ContextReleased, RequestCancelled
from kvcomm.memory.segments import Segment
from kvcomm.reuse.policy import ReusePolicy

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIALS = ["<|bos|>", "<|start|>", "<|end|>"]


def byte_tokenizer(chat_template: str | None = CHATML, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, three control tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        bos = ("<|bos|>", backend.token_to_id("<|bos|>"))
        backend.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>", chat_template=chat_template
    )


class FakeEngine:
    """Answers prompts with a function of their text.

    Attributes:
        prompts: text of every prompt submitted, in order.
        handles: handle of every request, in order.
        open_prompts: every open prompt, in order.
    """

    def __init__(
        self,
        answer: Callable[[str], str | Exception] = lambda text: f"<{len(text)}>",
        *,
        gated: bool = False,
        tokenizer: PreTrainedTokenizerFast | None = None,
        max_context: int = 100_000,
    ) -> None:
        self.tokenizer = tokenizer or byte_tokenizer()
        self.encoder = TextEncoder(self.tokenizer)
        self.max_context = max_context
        self.prompts: list[str] = []
        self.samplings: list[SamplingParams] = []
        self.tenants: list[str] = []
        self.policies: list[ReusePolicy | None] = []
        self.handles: list[RequestHandle] = []
        self.open_prompts: list[FakeOpenPrompt] = []
        self.policy = ReusePolicy.exact()
        self.is_closed = False
        self._answer = answer
        self._gated = gated
        self._lock = threading.Lock()
        self.lock = threading.RLock()

    @property
    def num_in_flight(self) -> int:
        return sum(not handle.done for handle in self.handles)

    def segment(self, text: str, *, name: str | None = None) -> Segment:
        return Segment(self.encoder.piece(text), name)

    def submit(
        self,
        prompt: Sequence[Segment],
        sampling: SamplingParams,
        *,
        adapter: str | None = None,
        tenant: str = "default",
        policy: ReusePolicy | None = None,
    ) -> RequestHandle:
        text = self.tokenizer.decode([token for segment in prompt for token in segment.token_ids])
        with self._lock:
            index = len(self.handles)
            handle = RequestHandle(index, cancel=lambda: self._cancel(handle))
            self.prompts.append(text)
            self.samplings.append(sampling)
            self.tenants.append(tenant)
            self.policies.append(policy)
            self.handles.append(handle)
        if not self._gated:
            self.finish(index)
        return handle

    def open_prompt(
        self, *, adapter: str | None = None, tenant: str = "default", policy: ReusePolicy | None = None
    ) -> FakeOpenPrompt:
        opened = FakeOpenPrompt(self, {"adapter": adapter, "tenant": tenant, "policy": policy})
        self.open_prompts.append(opened)
        return opened

    def finish(self, index: int) -> None:
        """Let a request answer, byte by byte."""
        handle, text = self.handles[index], self.prompts[index]
        answer = self._answer(text)
        if isinstance(answer, Exception):
            handle.settle(answer)
            return
        ids = tuple(self.tokenizer.encode(answer, add_special_tokens=False))
        for token in ids:
            handle.publish(Chunk(0, self.tokenizer.decode([token]), (token,), None, None))
        usage = Usage(len(text), 0, 0, len(text), len(ids), 0.0, 0.0, 0.0)
        handle.settle(Completion((Choice(0, answer, ids, "stop", None),), usage))

    def close(self) -> None:
        self.is_closed = True

    def _cancel(self, handle: RequestHandle) -> None:
        with self._lock:
            if not handle.done:
                handle.settle(RequestCancelled(f"request {handle.request_id} was cancelled"))


class FakeOpenPrompt:
    """Knows what it was given; what it is closed with must begin with that.

    Attributes:
        settings: with which it was opened.
        names: of the segments that it was given.
    """

    def __init__(self, engine: FakeEngine, settings: dict[str, Any]) -> None:
        self.engine = engine
        self.settings = settings
        self.names: list[str | None] = []
        self.is_closed = False
        self.is_cancelled = False
        self._parts: list[Callable[[], tuple[int, ...] | None]] = []  # None: not known yet

    @property
    def is_open(self) -> bool:
        return not self.is_closed and not self.is_cancelled

    @property
    def text(self) -> str:
        """All that is known, up to an answer that is not there yet."""
        return self.engine.tokenizer.decode(self._known())

    def append(self, prompt: Sequence[Segment]) -> FakeOpenPrompt:
        assert self.is_open
        assert any(segment.token_ids for segment in prompt), "the engine refuses an empty prompt"
        ids = tuple(token for segment in prompt for token in segment.token_ids)
        self._parts.append(lambda: ids)
        self.names += [segment.name for segment in prompt]
        return self

    def follow(
        self, source: RequestHandle, *, name: str, keep: Callable[[tuple[int, ...]], tuple[int, ...]]
    ) -> FakeOpenPrompt:
        assert self.is_open
        assert source in self.engine.handles
        self._parts.append(lambda: keep(source.result().token_ids) if source.done else None)
        self.names.append(name)
        return self

    def close(self, sampling: SamplingParams, *, prompt: Sequence[Segment]) -> RequestHandle:
        assert self.is_open
        self.is_closed = True
        read = self._known()
        assert read == [token for segment in prompt for token in segment.token_ids][: len(read)]
        return self.engine.submit(prompt, sampling, **self.settings)

    def cancel(self) -> None:
        self.is_cancelled = True

    def __enter__(self) -> FakeOpenPrompt:
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.is_closed:
            self.cancel()

    def _known(self) -> list[int]:
        known = itertools.takewhile(lambda ids: ids is not None, (part() for part in self._parts))
        return [token for ids in known for token in ids or ()]


class ContextCounter:
    """Knows every context made and which of them are still open."""

    def __init__(self) -> None:
        self.open: set[FakeContext] = set()
        self.num_made = 0
        self.numbers = itertools.count()

    def root(self) -> FakeContext:
        return FakeContext(self, ())


class FakeContext:
    """The texts it was built from; every open one counts as one page."""

    def __init__(self, counter: ContextCounter, path: tuple[str, ...]) -> None:
        self.counter = counter
        self.path = path
        counter.num_made += 1
        counter.open.add(self)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple("".join(self.path).encode())

    def fork(self) -> FakeContext:
        self._require_open()
        return FakeContext(self.counter, self.path)

    def extend(self, text: str) -> FakeContext:
        self._require_open()
        self.path = (*self.path, text)
        return self

    def submit(self, sampling: SamplingParams) -> RequestHandle:
        """Answers with its own seed; the answer stands behind the context at once."""
        self._require_open()
        answer = f"[{sampling.seed}]"
        self.extend(answer)
        handle = RequestHandle(next(self.counter.numbers), cancel=lambda: None)
        usage = Usage(1, 0, 0, 1, 1, 0.0, 0.0, 0.0)
        handle.settle(Completion((Choice(0, answer, (1,), "stop", None),), usage))
        return handle

    def release(self) -> None:
        self.counter.open.discard(self)

    def _require_open(self) -> None:
        if self not in self.counter.open:
            raise ContextReleased("released")

    def __enter__(self) -> FakeContext:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()
