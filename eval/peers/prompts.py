"""What is asked: prompts cut from this project's own files, none of them twice.

Every engine gets the same token ids. kvcomm's own way to name the parts of a prompt, segments, takes texts; a prompt in
parts is therefore tokenized part by part for everybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from kvcomm.errors import InvalidRequest

ROOT = Path(__file__).parents[2]
FILES = ("docs/*.md", "*.md", "kvcomm/**/*.py", "eval/**/*.py", "tests/**/*.py")
"""In this order; about a million tokens."""

PREFIXES = (
    "You read documents carefully and answer in one sentence. Read this document:\n",
    "You are a careful critic. You weigh what is said against what is known, you never repeat yourself, and you name "
    "the place where you found something. The document that you are to judge:\n",
    "You plan. You say in three short steps how what stands here is to be carried out by others, who know nothing of "
    "it and cannot ask. What is to be carried out:\n",
)
QUESTION = "\nWhat is said about it? In one sentence:"

ROLES: Mapping[str, str] = {
    "planner": "You plan. You say in three short steps how a question is to be answered by the others.",
    "solver": "You solve what is asked, step by step, and write down every calculation that you make on the way.",
    "checker": "You check what others have calculated, line by line, and say what is right and what has to be changed.",
    "critic": "You are a careful critic. You weigh what was said, never repeat it, and name what has been left out.",
    "editor": "You are the editor of a team. You write the final answer, short and plain, from what the others said.",
}
"""A team of five and what each of them is told."""


class Part(NamedTuple):
    """A text of a prompt; `is_dynamic`: it differs from request to request."""

    name: str
    text: str
    is_dynamic: bool = False


@dataclass(frozen=True)
class Prompt:
    """Parts one behind the other, and the token ids of each."""

    parts: tuple[Part, ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def token_ids(self) -> list[int]:
        """Of all of it."""
        return [token for part in self.ids for token in part]

    @property
    def fields(self) -> dict[str, Any]:
        """For kvcomm: all parts but the last one as segments."""
        kinds = {True: "dynamic", False: "static"}
        return {
            "segments": [
                {"id": part.name, "content": part.text, "kind": kinds[part.is_dynamic]} for part in self.parts[:-1]
            ]
        }

    @property
    def tail(self) -> str:
        """What stands behind the segments."""
        return self.parts[-1].text


class Texts:
    """Hands out stretches of text, each once."""

    def __init__(self, tokenizer_file: Path) -> None:
        """Make one.

        Args:
            tokenizer_file: tokenizer.json of the model.

        Raises:
            InvalidRequest: there is none, or this project's files are not there.
        """
        if not tokenizer_file.is_file():
            raise InvalidRequest(f"{tokenizer_file} is not there: eval.peers needs the folder of a model that has one")
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._stream = self._all_tokens()

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text alone, without start tokens."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def tokens(self, num_tokens: int) -> list[int]:
        """The next ones."""
        taken = [token for _, token in zip(range(num_tokens), self._stream, strict=False)]
        if len(taken) < num_tokens:
            raise InvalidRequest(f"{ROOT} does not hold as much text as is to be asked; ask for fewer turns")
        return taken

    def text(self, num_tokens: int) -> str:
        """The next text of about so many tokens."""
        decoded: str = self._tokenizer.decode(self.tokens(num_tokens))
        return decoded

    def prompt(self, parts: Sequence[Part]) -> Prompt:
        """A prompt in parts; parts without tokens are left out."""
        ids = {part: self.encode(part.text) for part in parts}
        kept = tuple(part for part in parts if ids[part])
        return Prompt(kept, tuple(ids[part] for part in kept))

    def about(self, prefix: int, document: str) -> Prompt:
        """A document behind one of the `PREFIXES`, and a question."""
        parts = (Part("reader", PREFIXES[prefix]), Part("document", document, True), Part("question", QUESTION))
        return self.prompt(parts)

    def agent(self, name: str, question: str, said: Mapping[str, str]) -> Prompt:
        """What one of `ROLES` reads: its role, the question, and what those before it have said."""
        parts = [Part("role", ROLES[name] + "\nQuestion: "), Part("asked", question, True)]
        for other, answer in said.items():
            parts += [Part(f"to {other}", f"\nThe {other} said: "), Part(other, answer, True)]
        return self.prompt([*parts, Part("turn", f"\nThe {name} says:")])

    def copying(self, num_tokens: int) -> list[int]:
        """A prompt that shows the same text twice and begins it once more: a greedy answer goes on with it."""
        half = self.tokens(num_tokens // 2 - 4)
        return [*half, *half, *half[:8]]

    def _all_tokens(self) -> Iterator[int]:
        for pattern in FILES:
            for file in sorted(ROOT.glob(pattern)):
                yield from self.encode(file.read_text(encoding="utf-8"))
