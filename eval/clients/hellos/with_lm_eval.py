"""lm-evaluation-harness over completions: multiple choice by log-likelihoods, perplexity, and generation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from checking import Server, main
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask

QUESTIONS = Path(__file__).with_name("questions.jsonl")


def evaluate(server: Server, rows: Path, **config: Any) -> list[dict[str, Any]]:
    """The samples of one task."""
    with tempfile.TemporaryDirectory() as cache:
        task = ConfigurableTask(
            config={
                "task": "hello",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": cache},
                "test_split": "test",
                "metadata": {"version": 1},
                **config,
            }
        )
        settings = {
            "model": server.model,
            "base_url": f"{server.url}/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": server.tokenizer,
            "max_retries": 1,
            "num_concurrent": 1,
        }
        found = simple_evaluate("local-completions", model_args=settings, tasks=[task], bootstrap_iters=0)
    assert found is not None
    return found["samples"]["hello"]


def tool(server: Server) -> list[dict[str, Any]]:
    """What it has instead: every choice of every question, and how likely the server says it is."""
    samples = evaluate(
        server,
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    found = []
    for sample in samples:
        for arguments, ((loglikelihood, is_greedy),) in zip(_arguments(sample), sample["resps"], strict=True):
            found.append(
                {
                    "context": arguments[0],
                    "continuation": arguments[1],
                    "loglikelihood": float(loglikelihood),
                    "is_greedy": bool(is_greedy),
                }
            )
    return found


def tool_perplexity(server: Server) -> None:
    samples = evaluate(
        server,
        QUESTIONS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    assert all(sample["word_perplexity"][0] < 0 for sample in samples), samples


def tool_generation(server: Server) -> None:
    samples = evaluate(
        server,
        QUESTIONS,
        output_type="generate_until",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_target="{{choices[answer]}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 8},
        metric_list=[{"metric": "exact_match"}],
    )
    assert all(isinstance(sample["filtered_resps"][0], str) for sample in samples), samples


def _arguments(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """Context and continuation of each request of a sample, as the harness logs them."""
    logged = sample["arguments"]
    if isinstance(logged, dict):
        return [(each["arg_0"], each["arg_1"]) for each in logged.values()]
    return [tuple(each) for each in logged]


if __name__ == "__main__":
    main(tool, tool_perplexity, tool_generation)
