"""lm-evaluation-harness through the server: a multiple-choice task by log-likelihoods.

    kvcomm serve --model smollm2-135m
    pip install 'lm-eval[api]'
    python examples/lm_eval_harness.py [ADDRESS] [MODEL]

On the command line, with a task of the harness:

    lm-eval run --model local-completions --tasks arc_easy \\
        --model_args model=smollm2-135m,base_url=http://127.0.0.1:8000/v1/completions,tokenizer_backend=remote
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask

ROWS = (
    {"question": "Which of these gives off light of its own?", "choices": ["the sun", "the moon"], "answer": 0},
    {"question": "What do plants take in through their roots?", "choices": ["sound", "water"], "answer": 1},
    {"question": "Which state of matter keeps its own shape?", "choices": ["a solid", "a gas"], "answer": 0},
    {"question": "Which of these animals lays eggs?", "choices": ["a horse", "a hen"], "answer": 1},
)


def main(address: str = "http://127.0.0.1:8000", model: str = "smollm2-135m") -> None:
    """Score the choices of a few questions."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
        task = ConfigurableTask(
            config={
                "task": "facts",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": folder},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{answer}}",
                "metric_list": [{"metric": "acc"}],
                "metadata": {"version": 1},
            }
        )
        found = simple_evaluate(
            "local-completions",
            model_args={
                "model": model,
                "base_url": f"{address}/v1/completions",
                "tokenizer_backend": "remote",  # the server's own: no second copy, no hub
                "num_concurrent": 4,
            },
            tasks=[task],
            bootstrap_iters=0,
        )
    assert found is not None
    print(f"accuracy {found['results']['facts']['acc,none']:.2f} on {len(ROWS)} questions")


if __name__ == "__main__":
    main(*sys.argv[1:])
