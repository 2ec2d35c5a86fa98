"""What a reader brings to the snippets of a page, and the server that its clients and `curl` commands ask.

Names in Python and files are few and said here; everything else a snippet has to make itself, above on its page.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI
from peft import get_peft_model

from kvcomm import Engine, EngineConfig
from kvcomm.model.loading import LoadedModel, load_model
from kvcomm.server.settings import ServerSettings
from tests.docs.snippets import ROOT
from tests.lora import fill, lora_config
from tests.server.live import Live, serving

MODEL = "smollm2-135m"
ADDRESS = "http://127.0.0.1:8000"
"""Where pages say that a server listens."""
POOL_TOKENS = 8192
ADAPTERS = ("poet", "judge")
PASSAGES = ("The tower was built in 1889. It is 330 metres high.", "The bridge was built in 1931. Cars cross it.")


@contextmanager
def server(loaded: LoadedModel) -> Iterator[Live]:
    """A server with the real model, set up as `kvcomm serve` sets it up where nothing is said."""
    with (
        Engine(loaded.model, loaded.tokenizer, config=EngineConfig(pool_tokens=POOL_TOKENS)) as engine,
        serving(engine, ServerSettings(model=MODEL, port=0)) as live,
    ):
        yield live
        engine.check_integrity()


def names(live: Live) -> dict[str, Any]:
    """Python names that pages use as the reader's own."""
    return {
        "client": OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0),
        "found": list(PASSAGES),
        "messages": [{"role": "user", "content": "How high is the tower?"}],
        "question": "How high is the tower?",
        "text": PASSAGES[0],
    }


def write_files(folder: Path) -> None:
    """Files that commands of pages name as the reader's own."""
    (folder / "rules.txt").write_text("Answer in one word.\n")
    (folder / "anchors").mkdir()
    (folder / "kv").mkdir()  # of a shared tier
    (folder / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())


def write_adapters(folder: Path) -> None:
    """Small random adapters for the real model, as PEFT saves them: `loras/poet`, `loras/judge`."""
    base = load_model(MODEL, dtype="float32", device="cpu").model  # a model of its own, since PEFT changes it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base model's config on disk
        wrapped = get_peft_model(base, lora_config())
        for seed, name in enumerate(ADAPTERS, start=1):
            fill(wrapped, "default", seed=seed)
            wrapped.save_pretrained(folder / "loras" / name)
