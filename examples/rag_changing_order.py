"""Passages in another order for every question: their KV is moved, not computed again.

    kvcomm serve --model smollm2-135m
    pip install openai
    python examples/rag_changing_order.py [ADDRESS] [MODEL]

A retriever ranks passages differently for each question, so prompts have no long prefix in common. Each passage is a
part of the message with a name: it is tokenized alone, recognized wherever it stands, and its KV moved there within the
bound that `reuse` asks for. Without `reuse` everything is exact, and only equal prefixes are reused.
"""

from __future__ import annotations

import sys

from openai import OpenAI

PASSAGES = (
    "The lighthouse of Altona was lit in 1907. Its lamp burned paraffin until 1954, and has been electric since then.",
    "The keeper's house has four rooms. The last keeper left it in 1978, when the light was made automatic.",
    "The light can be seen over 19 nautical miles. It flashes twice every ten seconds, white over the open sea.",
    "The tower is 31 metres high and built of red brick, with 142 steps to the gallery.",
    "Every summer the tower is open on Sundays. Children under six pay nothing.",
    "In the storm of 1962 the sea took the pier, and for nine days the keeper could not be reached.",
)
QUESTIONS = {
    "How high is the tower?": (3, 0, 2, 1),
    "When did the last keeper leave?": (1, 5, 0, 3),
    "How far can the light be seen?": (2, 3, 1, 0),
    "What happened in 1962?": (5, 1, 0, 2),
    "When can I go up?": (4, 3, 2, 5),
}
"""And what the retriever finds for them, the best first."""

REUSE = {"mode": "approximate", "max_divergence": 0.05, "confidence": 0.9}


def main(address: str = "http://127.0.0.1:8000", model: str = "smollm2-135m") -> None:
    """Ask everything, and tell where the tokens of each prompt came from."""
    with OpenAI(base_url=f"{address}/v1", api_key="unused") as client:
        for question, found in QUESTIONS.items():
            passages = [{"type": "text", "text": PASSAGES[at] + "\n", "name": "passage"} for at in found]
            answer = client.chat.completions.create(
                model=model,
                messages=[
                    {"role": "system", "content": "Answer from the passages, in one sentence."},
                    {"role": "user", "content": [*passages, {"type": "text", "text": question}]},  # type: ignore[list-item]
                ],
                max_tokens=30,
                temperature=0,
                extra_body={"reuse": REUSE},
            )
            usage = answer.usage.to_dict() if answer.usage else {}
            print(f"{question} {answer.choices[0].message.content}")
            print(
                f"   {usage['prompt_tokens']} tokens: {usage['cached_prefix_tokens']} cached, "
                f"{usage['aligned_tokens']} moved, {usage['computed_tokens']} computed"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
