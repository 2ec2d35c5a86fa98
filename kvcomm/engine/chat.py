"""From messages to the segments of a prompt.

The model's chat template is rendered with stand-ins in place of every text that is not its own, and cut at them: so
what the template writes keeps its exact form, and every text is a segment that is tokenized on its own, with the same
ids wherever it stands. What a part of a message is, is decided by one rule: the strings of system messages and
`Static` are the template, the same in every request; other strings are their turn's own text; segments and named parts
are passages.

Always holds: the prompt reads exactly as the chat template writes these messages (it is rendered a second time, with
the texts in place, and compared), and control tokens that somebody's text spells out are ordinary text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from kvcomm import values
from kvcomm.engine.chat_template import ROLES, ChatTemplate, Message, Messages, Placed, Static, TemplateSettings
from kvcomm.engine.encoding import PromptReader, TextEncoder
from kvcomm.engine.marks import Marks
from kvcomm.engine.token_texts import TokenTexts
from kvcomm.errors import InvalidRequest, TemplateError
from kvcomm.memory.segments import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PASSAGE, TEXT = "passage", "text"
"""Names of passages that bring none, and of turns' own texts."""

PART_FIELDS = ("type", "text", "name", "dynamic")


def pieces_of(marks: Marks[Placed], text: str, whole: str) -> list[str | Placed]:
    """Rendered text in turn with what is placed in it; all of it together is `whole`.

    Args:
        text, whole: as in `Rendered`, or the end of both.

    Raises:
        TemplateError: the chat template drops, repeats, moves or changes a text that may only be taken as it is.
    """
    pieces = marks.cut(text, lambda placed: placed.label)
    if not marks.slots:
        return pieces
    found: list[str | Placed] = []
    at, label = 0, "messages"
    for index, piece in enumerate(pieces):
        behind = next(map(_shown, pieces[index + 1 : index + 2]), None)
        written = _shown(piece)
        if isinstance(piece, Placed):
            label = piece.label
            if piece.segment is None:  # a turn's own text: whatever the template makes of it
                written = _written(written, behind, whole, at)
                piece = Placed(label, written, piece.name)
        if not whole.startswith(written, at):
            raise _changed(label)
        at += len(written)
        found += [piece] if written or (isinstance(piece, Placed) and piece.segment is not None) else []
    if at != len(whole):
        raise _changed(label)
    return found


def _written(shown: str, behind: str | None, whole: str, at: int) -> str:
    """What stands for a text at that place of the whole, in front of what is behind it."""
    if behind is None:
        return whole[at:]
    if whole.startswith(shown + behind, at):
        return shown
    end = whole.find(behind, at)
    return whole[at:] if end < 0 else whole[at:end]


def _shown(piece: str | Placed) -> str:
    return piece if isinstance(piece, str) else piece.shown


def _changed(label: str) -> TemplateError:
    return TemplateError(
        f"{label}: the chat template writes it differently there, and it has to stay as it is; take white space from "
        "its ends, or put other text around it"
    )


Tokens: TypeAlias = Callable[[str], tuple[int, ...]]


def rendered_ids(encoder: TextEncoder, marks: Marks[Any], text: str, tokens: Tokens | None = None) -> tuple[int, ...]:
    """Token ids of rendered text: its control tokens are real, hidden ones ordinary text.

    Args:
        tokens: tokenizes text without hidden ones; None: the encoder.

    Raises:
        InvalidRequest: the tokenizer cannot take a hidden one as ordinary text.
    """
    ids: list[int] = []
    for piece, control in marks.split(text):
        ids += (tokens or encoder.piece)(piece)
        if control is not None:
            ids += encoder.plain(control, label="a message")
    return tuple(ids)


def segments_of(
    encoder: TextEncoder, marks: Marks[Placed], pieces: Sequence[str | Placed], tokens: Tokens | None = None
) -> Iterator[Segment]:
    """A segment for each piece; see `rendered_ids`. Static ones have no name."""
    for piece in pieces:
        if isinstance(piece, str):
            yield Segment(rendered_ids(encoder, marks, piece, tokens))
        elif piece.segment is None:
            yield Segment(rendered_ids(encoder, marks, piece.shown, tokens), piece.name)
        else:
            yield piece.segment


class ChatPrompts:
    """Reads conversations for one model. Safe to use from several threads."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder, reader: PromptReader, texts: TokenTexts
    ) -> None:
        self._template = ChatTemplate(tokenizer)
        self._encoder = encoder
        self._reader = reader
        self._texts = texts

    def segments(self, messages: Messages, **settings: Unpack[TemplateSettings]) -> tuple[Segment, ...]:
        """The segments of a conversation, as the model's chat template writes it.

        The content of a message is one part, or a list of parts; these are joined with nothing in between.

        - A `Segment` is a passage: the same ids wherever it stands, so its KV can be moved. Passages of one name are
          of one kind; one without a name is a "passage".
        - {"type": "text", "text": ...} with a "name", or with "dynamic": True, is a passage as well.
        - `Static(text)`, and in system messages every other text, is a part of the template: what is known about moving
          text belongs to it, so nothing that differs from request to request should be there.
        - Every other text is the turn's own, a segment named "text". Only this may be trimmed by the chat template.

        Control tokens spelled out in messages are ordinary text.

        Args:
            messages: dicts with "role", "content", and what else the chat template looks at.
            settings: `tools` are JSON schemas of functions, refused where the chat template has no place for them;
                `variables` what else it may look at, such as {"enable_thinking": False}; `speaks` puts the beginning
                of an answer behind the messages.

        Raises:
            TemplateError: there is no chat template, or it changes or rejects something; names the message and part.
            InvalidRequest: messages or parts that are none, or a segment with a control token in it; names them.
        """
        if not self._template.exists:
            raise TemplateError("this model has no chat template; give generate() a text or segments of your own")
        marks: Marks[Placed] = Marks(self._encoder.control_pattern, in_answers=self._encoder.answer_pattern)
        given = values.items("messages", messages, "a list of messages")
        read = [self._message(marks, message, f"messages[{index}]") for index, message in enumerate(given)]
        tools = settings.get("tools")
        described = None if tools is None else list(tools)
        if described and not self._template.shows_tools:
            raise TemplateError("the chat template has no place for tools; describe them in a system message")
        shown: TemplateSettings = {**settings, "tools": marks.hide(described)}
        rendered = self._template.render_parts(marks, read, **shown)
        if self._template.drops_system and any(each.parts and each.fields["role"] == "system" for each in read):
            raise TemplateError("the chat template drops system messages; put their text into the first user message")
        pieces = pieces_of(marks, rendered.text, rendered.whole)
        return tuple(segments_of(self._encoder, marks, pieces))

    def _message(self, marks: Marks[Placed], message: object, label: str) -> Message:
        if not isinstance(message, Mapping):
            raise InvalidRequest(
                f"{label} must be a message such as {{'role': 'user', 'content': 'hello'}}, not {values.told(message)}"
            )
        role = values.text(f"{label}['role']", message.get("role"))
        role = ROLES.get(role, role)
        others = {str(name): value for name, value in message.items() if name not in ("role", "content")}
        parts = self._parts(marks, message.get("content"), role, f"{label}['content']")
        return Message({"role": role, **marks.hide(others)}, parts)

    def _parts(self, marks: Marks[Placed], content: object, role: str, label: str) -> tuple[str | Placed, ...]:
        if content is None:
            return ()
        if isinstance(content, str | Static | Segment | Mapping):
            items: Sequence[object] = (content,)
        else:
            items = values.items(label, content, "a text, a Segment, or a list of such parts")
        one = len(items) == 1
        parts = [
            self._part(marks, item, role, label if one else f"{label}[{index}]") for index, item in enumerate(items)
        ]
        return joined(parts)

    def _part(self, marks: Marks[Placed], part: object, role: str, label: str) -> str | Placed:
        if isinstance(part, Static):
            return marks.hide_text(values.text(f"the text of {label}", part.text), role)
        if isinstance(part, Segment):
            return self._passage(marks, part, role, label)
        if isinstance(part, Mapping):
            text, name = _named_text(part, label)
        elif isinstance(part, str):
            text, name = values.text(label, part), None
        else:
            raise InvalidRequest(
                f"{label} must be a text, Static(text), a Segment or {{'type': 'text', 'text': ...}}, not "
                f"{values.told(part)}"
            )
        return placed_text(self._encoder, marks, text, role, name, label)

    def _passage(self, marks: Marks[Placed], given: Segment, role: str, label: str) -> Placed:
        given = self._reader.checked(given)
        if role != "assistant":
            self._encoder.require_ordinary(given.token_ids, label=label)
        name = PASSAGE if given.name is None else given.name
        shown = marks.hide_text(self._texts.behind(given.token_ids), role)
        return Placed(label, shown, name, Segment(given.token_ids, name))


def placed_text(
    encoder: TextEncoder, marks: Marks[Placed], text: str, role: str, name: str | None, label: str
) -> str | Placed:
    """A text in a message by the one rule: with a name a passage, in system messages static, else the turn's own."""
    shown = marks.hide_text(text, role)
    if name is not None:
        return Placed(label, shown, name, Segment(encoder.plain(text, label=label), name))
    return shown if role == "system" else Placed(label, shown, TEXT)


def joined(parts: Sequence[str | Placed]) -> tuple[str | Placed, ...]:
    """Parts without empty ones; a turn's own texts that touch are one."""
    found: list[str | Placed] = []
    for part in parts:
        last = found[-1] if found else None
        if not _shown(part) and (isinstance(part, str) or part.segment is None or not part.segment.token_ids):
            continue
        if isinstance(part, Placed) and isinstance(last, Placed) and part.segment is None is last.segment:
            found[-1] = Placed(last.label, last.shown + part.shown, last.name)
        else:
            found.append(part)
    return tuple(found)


def _named_text(part: Mapping[Any, object], label: str) -> tuple[str, str | None]:
    """Text and name of a part as OpenAI has it, with what is added here: name, dynamic."""
    unknown = [name for name in part if name not in PART_FIELDS]
    if unknown:
        raise InvalidRequest(f"{label} has the unknown field {unknown[0]!r}; there are {', '.join(PART_FIELDS)}")
    if part.get("type") != "text":
        raise InvalidRequest(f"{label} must be of type 'text', not {values.shown(part.get('type'))}")
    text = values.text(f"{label}['text']", part.get("text"))
    name, dynamic = part.get("name"), part.get("dynamic")
    checked = None if name is None else values.text(f"{label}['name']", name)
    is_dynamic = name is not None if dynamic is None else values.truth_value(f"{label}['dynamic']", dynamic)
    return text, (checked or PASSAGE) if is_dynamic else None
