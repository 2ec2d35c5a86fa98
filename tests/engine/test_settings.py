"""What may be said by name is what there is to say: completion and type checks know every setting."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields

from kvcomm.engine.context import Context
from kvcomm.engine.engine import Engine
from kvcomm.engine.open_prompt import OpenPrompt
from kvcomm.engine.sampling import JSON_SCHEMA, SamplingParams, SamplingSettings
from kvcomm.engine.settings import EngineSettings, RequestSettings


def named(call: Callable[..., object]) -> set[str]:
    """Parameters of a call that are said by name only."""
    return {
        name for name, each in inspect.signature(call).parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY
    }


def test_settings_of_sampling_are_its_fields() -> None:
    assert {*SamplingSettings.__annotations__} == {*(each.name for each in fields(SamplingParams)), JSON_SCHEMA}


def test_settings_of_a_request_are_what_submit_takes() -> None:
    own = RequestSettings.__annotations__.keys() - SamplingSettings.__annotations__.keys()
    assert own == named(Engine.submit) - {"lesson"}  # which is for those who warm up


def test_settings_of_an_engine_are_what_it_takes() -> None:
    assert {*EngineSettings.__annotations__} == named(Engine.__init__) - {"weights_id"}  # which loading knows


def test_calls_that_take_settings_say_so() -> None:
    for call in (
        Engine.submit,
        Context.generate,
        Context.submit,
        Context.stream,
        Context.astream,
        Context.agenerate,
        OpenPrompt.close,
    ):
        assert inspect.signature(call).parameters["settings"].annotation == "Unpack[SamplingSettings]", call
    for call in (Engine.generate, Engine.chat):
        assert inspect.signature(call).parameters["settings"].annotation == "Unpack[RequestSettings]", call
    assert inspect.signature(Engine.load).parameters["settings"].annotation == "Unpack[EngineSettings]"
