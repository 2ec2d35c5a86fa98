"""A packaged model of some 100 kB: a real wheel with a real GGUF file inside, made in the test."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import torch

from kvcomm.model.registry import PackagedModel
from tests.tiny import SPECIAL_TOKENS, TinyModel

NAME = "tiny"
WHEEL_FILE = "kvcomm_tiny_model-1.0-py3-none-any.whl"
MEMBER = "kvcomm_tiny_model/tiny.gguf"
METADATA = (
    "Metadata-Version: 2.1",
    "Name: kvcomm-tiny-model",
    "Version: 1.0",
    "Requires-Dist: no-such-package",
)
WHEEL = ("Wheel-Version: 1.0", "Generator: test", "Root-Is-Purelib: true", "Tag: py3-none-any")
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
NORMAL_TOKEN, CONTROL_TOKEN = 1, 3


def make_wheel(folder: Path, tiny: TinyModel) -> PackagedModel:
    """Write the wheel of `tiny` into `folder` and describe it as a packaged model."""
    gguf_path = folder / "tiny.gguf"
    write_gguf(gguf_path, tiny)
    wheel = folder / WHEEL_FILE
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_path, MEMBER)
        for file_name, lines in (("METADATA", METADATA), ("WHEEL", WHEEL), ("RECORD", ())):
            archive.writestr(f"kvcomm_tiny_model-1.0.dist-info/{file_name}", "\n".join(lines))
    entry = PackagedModel(
        name=NAME,
        requirement="kvcomm-tiny-model==1.0",
        wheel_file=WHEEL_FILE,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        gguf_sha256=hashlib.sha256(gguf_path.read_bytes()).hexdigest(),
        license="CC0-1.0",
        needed_bytes=1_000_000,
    )
    gguf_path.unlink()
    return entry


def write_gguf(path: Path, tiny: TinyModel) -> None:
    """Write a Llama and its byte-level BPE tokenizer as llama.cpp would, unquantized."""
    writer = gguf.GGUFWriter(path, "llama")
    _add_settings(writer, tiny)
    _add_tokenizer(writer, tiny)
    config = tiny.model.config
    for name, value in tiny.model.state_dict().items():
        if name.endswith("q_proj.weight"):
            value = interleave_rope(value, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            value = interleave_rope(value, config.num_key_value_heads)
        writer.add_tensor(_gguf_name(name), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of a projection from transformers' rope halves to llama.cpp's interleaved pairs."""
    half = weight.shape[0] // num_heads // 2
    return weight.view(num_heads, 2, half, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def _gguf_name(name: str) -> str:
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{BLOCK_NAMES[part]}.weight"


def _add_settings(writer: gguf.GGUFWriter, tiny: TinyModel) -> None:
    config = tiny.model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tiny: TinyModel) -> None:
    tokenizer = tiny.tokenizer
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL_TOKEN if token in SPECIAL_TOKENS else NORMAL_TOKEN for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
