"""Whatever is opened, followed, closed, cancelled and cut in whatever order: answers are the stock forward's, no page
is lost, and what comes to nothing says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcomm import Engine, EngineConfig
from kvcomm.engine.context import Context
from kvcomm.engine.handle import RequestHandle
from kvcomm.engine.open_prompt import OpenPrompt
from kvcomm.errors import InvalidRequest, RequestCancelled, SourceFailed
from tests.engine.conftest import greedy, some_tokens
from tests.limits import PATIENCE_S
from tests.tiny import tiny_model

NUM_NEW = 10
MAX_PARTS, MAX_NODES, MAX_CONTEXTS = 3, 12, 2
TINY = tiny_model()
COMMON = some_tokens(24)
PROMPTS = [COMMON[:start] + some_tokens(24 - start, seed=start) for start in (0, 9, 16, 24)]
ANSWERS: dict[tuple[tuple[int, ...], str | None], tuple[int, ...]] = {}

numbers = strategies.integers(0, 1000)
prompts = strategies.sampled_from(PROMPTS)
lengths = strategies.integers(1, 24)


def answered(prompt: tuple[int, ...], stop: str | None = None) -> tuple[int, ...]:
    """The stock forward's answer; where a stop string cuts it, the tokens of the text before that."""
    if (prompt, stop) not in ANSWERS:
        ids = greedy(TINY.model, prompt, NUM_NEW)
        if stop is not None:
            ids = _cut(ids, stop)
        ANSWERS[prompt, stop] = tuple(ids)
    return ANSWERS[prompt, stop]


def _cut(ids: list[int], stop: str) -> list[int]:
    """Leading tokens of the text before a stop string, which begins a token here."""
    texts = [str(TINY.tokenizer.decode(ids[:end], skip_special_tokens=True)) for end in range(len(ids) + 1)]
    end = next((at for at, text in enumerate(texts) if stop in text), None)
    if end is None:
        return ids
    whole = texts[end][: texts[end].index(stop)]
    return ids[: max(at for at, text in enumerate(texts) if whole.startswith(text))]


def stop_of(prompt: list[int]) -> str | None:
    """A stop string that cuts the answer to a prompt where a token of plain text begins."""
    ids = greedy(TINY.model, prompt, NUM_NEW)
    for at in range(3, NUM_NEW):
        text = str(TINY.tokenizer.decode(ids[:at], skip_special_tokens=True))
        word = str(TINY.tokenizer.decode([ids[at]], skip_special_tokens=True))
        if word.isascii() and len(word) > 1 and word not in text and _cut(ids, word) == ids[:at]:
            return word
    return None


@dataclass(eq=False)
class Node:
    """An answer as the naive model knows it: a finished request, or an open prompt made of texts and others' answers.

    Attributes:
        prompt: None: it was complete from the beginning, in `parts`.
        context: that it stands behind.
    """

    tenant: str
    parts: list[tuple[int, ...] | Node] = field(default_factory=list)
    prompt: OpenPrompt | None = None
    handle: RequestHandle | None = None
    stop: str | None = None
    context: Context | None = None
    is_cancelled: bool = False

    @property
    def sources(self) -> Iterator[Node]:
        return (part for part in self.parts if isinstance(part, Node))

    def waits_for(self, other: Node) -> bool:
        return self is other or any(source.waits_for(other) for source in self.sources)

    def has_failed(self) -> bool:
        """Whether there is no answer, and there will be none; a cancel may have come too late for that."""
        if self.handle is not None and self.handle.done:
            try:
                self.handle.result()
            except (RequestCancelled, SourceFailed):
                return True
            return False
        return self.is_cancelled or any(source.has_failed() for source in self.sources)

    def ids(self) -> tuple[int, ...]:
        """Of its prompt."""
        return tuple(token for part in self.parts for token in (part.answer() if isinstance(part, Node) else part))

    def answer(self) -> tuple[int, ...]:
        return answered(self.ids(), self.stop)


class OpenPromptMachine(RuleBasedStateMachine):
    """One engine with a small pool, and what its callers hold."""

    @initialize()
    def begin(self) -> None:
        config = EngineConfig(page_size=4, pool_tokens=480, max_batch_tokens=24, prefill_chunk=8, follow_share=0.9)
        self.engine = Engine(TINY.model, TINY.tokenizer, config=config)
        self.nodes: list[Node] = []
        self.contexts: list[Context] = []

    def opened(self, which: int) -> Node | None:
        """An open prompt that nobody has closed or given up."""
        found = [node for node in self.nodes if node.prompt is not None and node.handle is None]
        found = [node for node in found if not node.is_cancelled]
        return found[which % len(found)] if found else None

    def put(self, node: Node, part: tuple[int, ...] | Node, call: Callable[[], object]) -> None:
        """Put something into an open prompt, which may have come to nothing meanwhile."""
        node.parts.append(part)
        try:
            call()
        except SourceFailed:
            assert any(source.has_failed() for source in node.sources)
            node.is_cancelled = True

    @rule(prompt=prompts, length=lengths, stops=strategies.booleans(), tenant=strategies.sampled_from("aab"))
    def ask(self, prompt: list[int], length: int, stops: bool, tenant: str) -> None:
        if len(self.nodes) < MAX_NODES:
            stop = stop_of(prompt[:length]) if stops else None
            handle = self.engine.submit(
                prompt[:length],
                tenant=tenant,
                max_new_tokens=NUM_NEW,
                temperature=0,
                ignore_eos=True,
                stop=() if stop is None else (stop,),
            )
            self.nodes.append(Node(tenant, [tuple(prompt[:length])], handle=handle, stop=stop))

    @rule(prompt=prompts, length=lengths, tenant=strategies.sampled_from("aab"))
    def open(self, prompt: list[int], length: int, tenant: str) -> None:
        if len(self.nodes) < MAX_NODES:
            opened = self.engine.open_prompt(prompt[:length], tenant=tenant)
            self.nodes.append(Node(tenant, [tuple(prompt[:length])], opened))

    @rule(prompt=prompts, length=lengths)
    def open_behind_a_context(self, prompt: list[int], length: int) -> None:
        source = next((node for node in self.nodes if node.tenant == "a" and not node.has_failed()), None)
        if source is None or len(self.nodes) >= MAX_NODES or len(self.contexts) >= MAX_CONTEXTS:
            return
        context = self.engine.context(prompt[:length], tenant="a")
        self.contexts.append(context)
        node = Node("a", [tuple(prompt[:length])], context=context)
        node.parts.append(source)
        wanted = source.prompt if source.handle is None else source.handle
        assert wanted is not None
        try:
            node.prompt = context.follow(wanted)
        except SourceFailed:
            assert source.has_failed()
            return
        self.nodes.append(node)

    @rule(which=numbers, prompt=prompts, length=lengths)
    def append(self, which: int, prompt: list[int], length: int) -> None:
        node = self.opened(which)
        if node is not None and node.prompt is not None and len(node.parts) < MAX_PARTS:
            opened = node.prompt
            self.put(node, tuple(prompt[:length]), lambda: opened.append(prompt[:length]))

    @rule(which=numbers, other=numbers)
    def follow(self, which: int, other: int) -> None:
        node = self.opened(which)
        if node is None or node.prompt is None or len(node.parts) >= MAX_PARTS:
            return
        opened, source = node.prompt, self.nodes[other % len(self.nodes)]
        wanted = source.prompt if source.handle is None else source.handle
        assert wanted is not None
        if source.tenant != node.tenant or source.waits_for(node):
            with pytest.raises((InvalidRequest, SourceFailed)) as refusal:
                opened.follow(wanted)
            if node.has_failed() or isinstance(refusal.value, SourceFailed):  # a source that has come to nothing
                node.is_cancelled = True
        else:
            self.put(node, source, lambda: opened.follow(wanted))

    @rule(which=numbers)
    def close(self, which: int) -> None:
        node = self.opened(which)
        if node is None or node.prompt is None:
            return
        try:
            node.handle = node.prompt.close(max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        except SourceFailed:
            assert any(source.has_failed() for source in node.sources)
            node.is_cancelled = True
            return
        with pytest.raises((InvalidRequest, SourceFailed)):
            node.prompt.append([5])

    @rule(which=numbers)
    def cancel(self, which: int) -> None:
        if self.nodes:
            node = self.nodes[which % len(self.nodes)]
            node.is_cancelled = True
            (node.handle if node.prompt is None or node.handle is not None else node.prompt).cancel()  # type: ignore[union-attr]

    @rule(which=numbers)
    def settle(self, which: int) -> None:
        """Wait for an answer that needs nobody to close anything."""
        ready = [node for node in self.nodes if self.is_ready(node)]
        if ready:
            self.judge(ready[which % len(ready)])

    @rule(length=strategies.integers(100, 180))
    def press(self, length: int) -> None:
        """Somebody needs most of the pool."""
        prompt = some_tokens(length, seed=1)
        found = self.engine.generate(prompt, max_new_tokens=1, temperature=0, ignore_eos=True, tenant="c")
        assert found.usage.computed_tokens + found.usage.exact_tokens == length

    @rule()
    def forget_the_cache(self) -> None:
        self.engine.cache.clear()

    def is_ready(self, node: Node) -> bool:
        return node.handle is not None and all(source.has_failed() or self.is_ready(source) for source in node.sources)

    def judge(self, node: Node) -> None:
        """The answer is the stock forward's, or there is a reason why there is none."""
        assert node.handle is not None
        assert node.handle.wait(PATIENCE_S)
        try:
            found = node.handle.result()
        except RequestCancelled:
            assert node.is_cancelled
            return
        except SourceFailed:
            assert any(source.has_failed() for source in node.sources)
            return
        assert found.token_ids == node.answer()
        usage = found.usage
        assert usage.prompt_tokens == len(node.ids())
        assert usage.aligned_tokens == 0
        assert usage.read_along_tokens <= usage.computed_tokens == sum(usage.reasons.values())
        if node.context is not None:
            assert node.context.tokens == (*node.ids(), *node.answer())

    @invariant()
    def pages_have_owners(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            for node in self.nodes:
                if node.prompt is not None and node.handle is None:
                    node.is_cancelled = True
                    node.prompt.cancel()
            for node in self.nodes:
                if node.handle is not None:
                    self.judge(node)
            assert self.engine.wait_idle(PATIENCE_S)
            assert self.engine.scheduler.read_along.readings == []
            for context in self.contexts:
                context.release()
            self.engine.check_integrity()
            self.engine.cache.clear()
            stats = self.engine.cache.stats()
            assert stats.num_free == stats.num_pages
        finally:
            self.engine.close()


TestOpenPrompts = OpenPromptMachine.TestCase
TestOpenPrompts.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
