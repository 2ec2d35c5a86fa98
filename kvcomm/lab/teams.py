"""Teams as evaluations run them: many runs of one, its graph and its prompts, and engines that have read its roles."""

from __future__ import annotations

from kvcomm.agents.comparison import read_roles
from kvcomm.agents.example_runs import BATCH, examples, limited, publish, run_all
from kvcomm.agents.graph import AgentGraph, Task
from kvcomm.agents.rendering import Filling, PromptRenderer

__all__ = [
    "BATCH",
    "AgentGraph",
    "Filling",
    "PromptRenderer",
    "Task",
    "examples",
    "limited",
    "publish",
    "read_roles",
    "run_all",
]
