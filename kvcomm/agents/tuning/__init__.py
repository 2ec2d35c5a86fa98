"""Tuning: settings of approximate reuse for one model and one team, chosen by what they cost in divergence."""

from kvcomm.agents.tuning.checking import Applied, LadderCheck, apply_profile, check_profile
from kvcomm.agents.tuning.profile import TuningProfile, read_profile
from kvcomm.agents.tuning.tuner import TuningTask, plan_tuning, tune

__all__ = [
    "Applied",
    "LadderCheck",
    "TuningProfile",
    "TuningTask",
    "apply_profile",
    "check_profile",
    "plan_tuning",
    "read_profile",
    "tune",
]
