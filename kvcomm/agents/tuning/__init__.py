"""Tuning: settings of approximate reuse for one model and one team, chosen by what they cost in divergence."""

from kvcomm.agents.tuning.checking import Applied, Check, apply_profile, check_profile
from kvcomm.agents.tuning.profile import TuningProfile, read_profile
from kvcomm.agents.tuning.tuner import Task, plan_tuning, tune

__all__ = [
    "Applied",
    "Check",
    "Task",
    "TuningProfile",
    "apply_profile",
    "check_profile",
    "plan_tuning",
    "read_profile",
    "tune",
]
