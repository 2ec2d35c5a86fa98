"""Small tokenizers of every kind that a model may bring, made in the test run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

CONTROL = ["<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("▁", "h"),
    ("▁", "w"),
    ("o", "r"),
    ("▁", "▁"),
    (")", "\n"),
    ("he", "ll"),
    (".", "\n"),
]
LETTERS = "▁abcdefghijklmnopqrstuvwxyzABCDHWY.,:;!?'()<>|_/0123456789é漢"


def _sentencepiece_vocab() -> dict[str, int]:
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *LETTERS, "\n", "\ufffd", *("".join(merge) for merge in MERGES)]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}


def llama(*, adds_bos: bool = False, adds_eos: bool = False, prefix_space: bool = True) -> PreTrainedTokenizerBase:
    """The stock class: BPE over whole texts, a space before a text, bytes for what it does not know."""
    tokenizer = LlamaTokenizer(
        vocab=_sentencepiece_vocab(), merges=MERGES, add_prefix_space=prefix_space, chat_template=CHAT_TEMPLATE
    )
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    if adds_bos or adds_eos:
        template = ["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return tokenizer


def legacy_llama() -> PreTrainedTokenizerBase:
    """As older files have it: the normalizer puts the space there, behind every control token too."""
    backend = Tokenizer(
        models.BPE(vocab=_sentencepiece_vocab(), merges=MERGES, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerBase:
    """Unigram behind metaspaces, one always before a text."""
    pieces = [
        (piece, -2.0 - index / 100)
        for index, piece in enumerate(["<unk>", *LETTERS, "\n", "\ufffd", "▁he", "llo", ")\n"])
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return _fast(backend, unk_token="<unk>")


def prefixed_bytes() -> PreTrainedTokenizerBase:
    """Byte-level BPE that puts a space before a text and never takes it back."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def wordpiece(*, cleans_up: bool = False) -> PreTrainedTokenizerBase:
    """Words and their parts: its texts never have the spaces that were there."""
    words = [
        "[UNK]",
        "hello",
        "world",
        "n",
        "'",
        "t",
        "s",
        "m",
        ".",
        "!",
        ",",
        "do",
        "##llo",
        "##n",
        "##'",
        "##t",
        "##.",
        "é",
    ]
    backend = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return _fast(backend, unk_token="[UNK]", clean_up_tokenization_spaces=cleans_up)


def suffixed() -> PreTrainedTokenizerBase:
    """Pieces that end with a mark for the end of a word, whose decoder treats the last one differently."""
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(["<unk>", "a</w>", "b", "b</w>", "c", ".</w>"])}, merges=[]
        )
    )
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return _fast(backend)


def joined() -> PreTrainedTokenizerBase:
    """A decoder that rewrites letters across tokens."""
    backend = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(["ab@@ ", "c", " ", "d@@", "@"])}, merges=[])
    )
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("@@ ", "")])
    return _fast(backend)


class SlowWords(PreTrainedTokenizer):
    """Written in Python: parts of words end with @@."""

    model_input_names: ClassVar = ["input_ids"]

    def __init__(self, **settings: Any) -> None:
        self._pieces = ["<unk>", "ab@@", "c", "d@@", "e", ".", "é"]
        super().__init__(unk_token="<unk>", **settings)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self._pieces)}

    def _tokenize(self, text: str, **settings: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace("@@ ", "")


class SlowSentencePiece(PreTrainedTokenizer):
    """Written in Python, as sentencepiece's own are: a space before a text, which decoding takes back."""

    model_input_names: ClassVar = ["input_ids"]

    def __init__(self, **settings: Any) -> None:
        self._ids = _sentencepiece_vocab()
        self._pieces = list(self._ids)
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **settings)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **settings: Any) -> list[str]:
        pieces: list[str] = []
        for letter in "▁" + text.replace(" ", "▁"):
            pieces += [letter] if letter in self._ids else [BYTES[byte] for byte in letter.encode("utf-8", "replace")]
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        raw = b"".join(bytes([int(each[3:5], 16)]) if each in BYTES else each.encode() for each in tokens)
        text = raw.decode("utf-8", "replace").replace("▁", " ")
        return text.removeprefix(" ")


def _fast(backend: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **settings)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    return tokenizer


def with_tools() -> PreTrainedTokenizerBase:
    """Added tokens that nobody flagged as special: a control token, runs of spaces, a word of the trade."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(content, special=False, normalized=False) for content in ("<|tool_call|>", "   ", "kvcomm")]
    )
    return tokenizer


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": tiny_tokenizer,
    "byte-level-prefixed": prefixed_bytes,
    "llama": llama,
    "llama-bos": lambda: llama(adds_bos=True),
    "llama-bos-eos": lambda: llama(adds_bos=True, adds_eos=True),
    "llama-unprefixed": lambda: llama(prefix_space=False),
    "llama-legacy": legacy_llama,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "wordpiece-cleaned": lambda: wordpiece(cleans_up=True),
    "suffixed": suffixed,
    "joined": joined,
    "slow-bytes": ByT5Tokenizer,
    "slow-words": SlowWords,
    "slow-sentencepiece": SlowSentencePiece,
    "added-tokens": with_tools,
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    """One tokenizer of a kind for all tests, which must not change it."""
    return KINDS[kind]()
