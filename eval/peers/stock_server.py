"""Transformers' own `generate` behind `/v1/completions`: what somebody has who serves a model without any engine.

    python -m eval.peers.stock_server FOLDER PORT THREADS

One request at a time, greedy, bf16, every prompt computed whole; token ids in, text out.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class StockServer(HTTPServer):
    """A model on a port of this machine."""

    def __init__(self, folder: str, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def answer(self, token_ids: list[int], max_tokens: int) -> str:
        """The greedy continuation, end tokens ignored."""
        prompt = torch.tensor([token_ids])
        with torch.inference_mode():
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=self.model.config.get_text_config().vocab_size,  # no token has this id
                pad_token_id=0,
            )
        text: str = self.tokenizer.decode(output[0, len(token_ids) :], skip_special_tokens=True)
        return text


class _Handler(BaseHTTPRequestHandler):
    server: StockServer

    def do_GET(self) -> None:
        self._send("application/json", json.dumps({"data": [{"id": "stock"}]}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = self.server.answer(asked["prompt"], asked["max_tokens"])
        usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
        event = {"choices": [{"index": 0, "text": text, "finish_reason": "length"}], "usage": usage}
        self._send("text/event-stream", f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")

    def _send(self, kind: str, content: str) -> None:
        body = content.encode()
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing is logged."""


def main() -> None:
    """Serve until a signal ends the process."""
    folder, port, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    StockServer(folder, int(port)).serve_forever()


if __name__ == "__main__":
    main()
