"""Options that are stated once in a dataclass: commands have each of them, and get them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from kvcomm.cli.spread import spread


@dataclass(frozen=True)
class Colours:
    near: Annotated[str, typer.Option("--near", help="Of what is near.")] = "red"
    far: Annotated[str | None, typer.Option("--far", envvar="FAR_COLOUR")] = None


@spread
def command(
    *,
    what: Annotated[str, typer.Argument(metavar="WHAT")],
    size: Annotated[int, typer.Option("--size", min=1)] = 3,
    colours: Colours,
    loud: Annotated[bool, typer.Option("--loud")] = False,
) -> None:
    """Paint something."""
    typer.echo(repr((what, size, colours, loud)))


app = typer.Typer()
app.command()(command)


def told(*arguments: str, **variables: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env=variables)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (["house"], {}, ("house", 3, Colours(), False)),
        (["--far", "blue", "house", "--loud"], {}, ("house", 3, Colours("red", "blue"), True)),
        (
            ["house", "--near", "pink", "--size", "5"],
            {"FAR_COLOUR": "grey"},
            ("house", 5, Colours("pink", "grey"), False),
        ),
    ],
)
def test_a_command_gets_its_options_together(
    arguments: list[str], variables: dict[str, str], expected: tuple[object, ...]
) -> None:
    assert told(*arguments, **variables) == repr(expected)


def test_help_shows_options_where_the_group_stands() -> None:
    shown = told("--help", COLUMNS="120")
    places = [shown.index(text) for text in ("Paint something.", "--size", "--near", "--far", "--loud")]
    assert places == sorted(places)
    assert "Of what is near." in shown


def test_an_option_without_a_default_is_refused() -> None:
    @dataclass(frozen=True)
    class Bare:
        size: Annotated[int, typer.Option("--size")]

    def bare(sizes: Bare) -> None: ...

    bare.__annotations__["sizes"] = Bare  # a class of this function, which its name does not find
    with pytest.raises(TypeError, match=r"'size' of Bare needs a default"):
        spread(bare)
