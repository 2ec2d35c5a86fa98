"""What keeping weights in fewer bits costs: the same text read by a model before and afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

from kvcomm.model.loading import LoadedModel
from kvcomm.model.names import WeightsKind
from kvcomm.model.quantized import quantize


@dataclass(frozen=True)
class Rounding:
    """How far a model with its weights in fewer bits is from the one as it was loaded, over one text.

    Attributes:
        num_tokens: positions of the text whose next token both predict.
        mean_kl: KL(as loaded || rounded) in nats, mean over the positions.
        max_kl: the largest of them.
        same_top: share of the positions at which the most probable token is the same.
        own_loss, loss: cross-entropy of the text in nats per token, as loaded and rounded.
        own_bytes, num_bytes: of parameters and buffers, as loaded and rounded; what is shared counts once.
    """

    num_tokens: int
    mean_kl: float
    max_kl: float
    same_top: float
    own_loss: float
    loss: float
    own_bytes: int
    num_bytes: int


def measure_rounding(loaded: LoadedModel, kind: WeightsKind) -> Rounding:
    """Quantize a model, in place, and compare its predictions over a packaged text of about 500 tokens.

    Raises:
        UnsupportedModel: see `quantize`.
    """
    model = loaded.model
    text = files("kvcomm.model").joinpath("rounding.txt").read_text(encoding="utf-8")
    token_ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    own_bytes, own = _num_bytes(model), _logprobs(model, token_ids)
    quantize(model, kind)
    got = _logprobs(model, token_ids)
    divergence = (own.exp() * (own - got)).sum(-1)
    following = token_ids[0, 1:, None]
    return Rounding(
        num_tokens=len(own),
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        same_top=float((own.argmax(-1) == got.argmax(-1)).float().mean()),
        own_loss=-float(own.gather(1, following).mean()),
        loss=-float(got.gather(1, following).mean()),
        own_bytes=own_bytes,
        num_bytes=_num_bytes(model),
    )


@torch.inference_mode()
def _logprobs(model: torch.nn.Module, token_ids: Tensor) -> Tensor:
    """[num_tokens - 1, vocab_size] float32: what is predicted from each token but the last."""
    logits: Tensor = model(input_ids=token_ids, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def _num_bytes(model: torch.nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
