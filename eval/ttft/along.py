"""Reading along: agents whose prompts are open while the outputs that they read are being written.

What a prompt lacks when it is complete, `num_left`, is what a producer writes last and the text behind it. `follow`
measures it: the last agent, who knows everything else, follows one output while it is decoded. `read_along` gives the
same first token without decoding: text taken as an output comes in pieces, each computed before the next one is there,
and as much is left as the follower lacked. `follow_team` lets all agents follow all outputs from the first one on: then
producers have several readers, each with much to read, and what answers in progress leave no time for is lacking, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from eval.command import note
from eval.stock import Stock
from eval.ttft.team import ONE_TOKEN, Team, tokens_of
from kvcomm import Completion, Engine, ReusePolicy, SamplingParams, Segment, Usage
from kvcomm.errors import InvalidRequest

PIECE = 32
"""Tokens of an output that come at once: about what an engine reads in a pass while others decode."""

NUM_KNOWN = 4
"""Segments of a prompt that are known from the start: role, question, and glue behind both."""

NUM_LOOKED_AT = 20
"""Most probable tokens of which probabilities are compared."""

FIRST_TOKEN = SamplingParams(max_new_tokens=1, ignore_eos=True, logprobs=NUM_LOOKED_AT)


def num_left(usage: Usage) -> int:
    """Prompt tokens that were not computed before the prompt was complete."""
    return usage.computed_tokens - usage.read_along_tokens


def follow_team(team: Team, num_output_tokens: int) -> list[Completion]:
    """Let every agent follow those before it, on a new question; what each of them answered.

    Args:
        num_output_tokens: of each output. The last agent, whom nobody reads, gives one token.
    """
    note(f"all agents follow outputs of {num_output_tokens} tokens while they are decoded")
    engine, texts = team.engine, team.texts()
    team.restart()
    names = [output.name for output in texts.outputs]
    with engine.held():  # all prompts are open before the first step
        opened = [engine.open_prompt(policy=ReusePolicy.exact()) for _ in team.agents]
        for agent, reader in enumerate(opened):
            for part in team.prompt(agent, texts):
                if part.name in names:
                    reader.follow(opened[names.index(part.name)], name=part.name)
                else:
                    reader.append([part])
        lengths = [num_output_tokens] * (len(opened) - 1) + [1]
        handles = [
            reader.close(SamplingParams(max_new_tokens=length, ignore_eos=True))
            for reader, length in zip(opened, lengths, strict=True)
        ]
    followed = [handle.result() for handle in handles]
    told = ", ".join(f"agent {agent}: {num_left(each.usage)}" for agent, each in enumerate(followed, start=1))
    note(f"  tokens that were left to compute: {told}")
    return followed


def follow(team: Team, num_output_tokens: int) -> Completion:
    """Let the last agent follow the one before it, all else being read; its first token."""
    note(f"the last agent follows an output of {num_output_tokens} tokens while it is decoded")
    engine, texts, exact = team.engine, team.texts(), ReusePolicy.exact()
    team.restart()
    *producers, last = team.agents
    *known, output, glue = team.prompt(last, texts)
    with engine.open_prompt(known, policy=exact) as opened:
        engine.wait_idle()
        sampling = SamplingParams(max_new_tokens=num_output_tokens, ignore_eos=True)
        opened.follow(engine.submit(team.prompt(producers[-1], texts), sampling, policy=exact), name=str(output.name))
        answer = opened.append([glue]).close(ONE_TOKEN).result()
    note(f"  {num_left(answer.usage)} of {answer.usage.prompt_tokens} tokens were left to compute")
    return answer


def read_along(engine: Engine, prompt: Sequence[Segment], num_tokens_left: int) -> Completion:
    """The first token of an agent that reads along, the output before its own being the last thing it is given.

    Args:
        prompt: begins with role and question.
        num_tokens_left: at its end, not read when it is complete; at least one.

    Raises:
        InvalidRequest: the prompt is not longer than that.
    """
    tokens = tokens_of(prompt)
    num_read = len(tokens) - num_tokens_left
    if num_read < 1:
        raise InvalidRequest(f"of a prompt of {len(tokens)} tokens {num_tokens_left} cannot be left to compute")
    num_known = min(num_read, sum(len(part.token_ids) for part in prompt[:NUM_KNOWN]))
    with engine.open_prompt(tokens[:num_known], policy=ReusePolicy.exact()) as opened:
        engine.wait_idle()
        for start in range(num_known, num_read, PIECE):
            opened.append(tokens[start : min(start + PIECE, num_read)])
            engine.wait_idle()
        assert opened.num_read == num_read, opened
        return opened.close(FIRST_TOKEN, prompt=prompt).result()


class Compared(NamedTuple):
    """A first token and transformers' own: whether they are the same, and nats between their log-probabilities."""

    is_same: bool
    error: float


def compare(stock: Stock, prompt: Sequence[int], served: Completion) -> Compared:
    """Hold a first token against transformers'; the error is the largest one among the most probable tokens."""
    truth = stock.log_probs(prompt)
    assert served.logprobs is not None
    top = served.logprobs[0].top
    found = torch.tensor([each.logprob for each in top])
    error = float((truth[[each.token_id for each in top]] - found).abs().max())
    return Compared(served.token_ids == (int(truth.argmax()),), error)
