"""Settings: flags over environment over file over defaults; unknown keys fail wherever they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kvcomm.errors import InvalidRequest
from kvcomm.server.settings import ServerSettings, load_settings


def file_with(folder: Path, text: str) -> Path:
    """A TOML file."""
    file = folder / "server.toml"
    file.write_text(text)
    return file


def test_defaults() -> None:
    settings = load_settings({}, {})
    assert settings == ServerSettings()
    assert settings.host == "127.0.0.1"


def test_precedence(tmp_path: Path) -> None:
    file = file_with(
        tmp_path, 'port = 1\nhost = "localhost"\nlog_level = "error"\n[engine]\npage_size = 8\nmax_running = 7\n'
    )
    environment = {"KVCOMM_SERVE_PORT": "2", "KVCOMM_SERVE_ENGINE__PAGE_SIZE": "32", "PATH": "/bin"}
    settings = load_settings({"port": 3, "host": None, "engine": {"max_batch_tokens": 512}}, environment, file)
    assert settings.port == 3  # the flag
    assert settings.engine.page_size == 32  # the environment
    assert (settings.host, settings.log_level, settings.engine.max_running) == ("localhost", "error", 7)  # the file
    assert settings.engine.max_batch_tokens == 512
    assert settings.keep_alive_s == ServerSettings().keep_alive_s


def test_a_flag_turns_off_what_the_file_turned_on(tmp_path: Path) -> None:
    file = file_with(tmp_path, "log_prompts = true\n")
    assert load_settings({}, {}, file).log_prompts
    assert not load_settings({"log_prompts": False}, {}, file).log_prompts
    assert not load_settings({}, {"KVCOMM_SERVE_LOG_PROMPTS": "false"}, file).log_prompts


def test_the_model_of_every_command() -> None:
    assert load_settings({}, {"KVCOMM_MODEL": "a/b"}).model == "a/b"
    assert load_settings({}, {"KVCOMM_MODEL": "a/b"}).name == "b"
    assert load_settings({}, {"KVCOMM_MODEL": "a/b", "KVCOMM_SERVE_MODEL": "c"}).model == "c"
    assert load_settings({"served_name": "d"}, {}).name == "d"


@pytest.mark.parametrize(
    ("text", "environment", "flags", "message"),
    [
        ("prot = 1", {}, {}, "unknown setting 'prot' in .*server.toml; known: .*port"),
        ("[engine]\npage = 1", {}, {}, "unknown engine settings"),
        ("[limits]\nx = 1", {}, {}, "unknown setting 'limits.x'"),
        ("", {"KVCOMM_SERVE_PROT": "1"}, {}, "unknown setting 'prot' in the environment"),
        ("", {}, {"prot": 1}, "unknown setting 'prot' in the command line"),
        ("", {"KVCOMM_SERVE_PORT": "tcp://10.0.0.1:80"}, {}, "setting 'port' in the environment: .* not 'tcp"),
        ("port = 65536", {}, {}, "setting 'port' in .*server.toml"),
        ("[engine]\npage_size = 0", {}, {}, "page_size must be at least 1"),
        ("engine = 5", {}, {}, "must be a table"),
        ('[engine]\nalpha = "strong"', {}, {}, "alpha must be finite factors"),
        ("[engine]\nalpha = [1, -1]", {}, {}, "alpha must be finite factors >= 0"),
        ("", {"KVCOMM_SERVE_ENGINE__PAGE_SIZE": "many"}, {}, "page_size must be a whole number"),
        ("port = ", {}, {}, "is not TOML"),
        ("request_timeout_s = inf", {}, {}, "request_timeout_s"),
    ],
)
def test_mistakes_say_where_they_are(
    tmp_path: Path, text: str, environment: dict[str, str], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load_settings(flags, environment, file_with(tmp_path, text))


def test_factors_are_a_number_or_a_list(tmp_path: Path) -> None:
    assert load_settings({}, {}, file_with(tmp_path, "[engine]\nalpha = 0.5")).engine.alpha == (0.5,)
    assert load_settings({}, {"KVCOMM_SERVE_ENGINE__ALPHA": "[1, 0.5, 1]"}).engine.alpha == (1, 0.5, 1)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nothing\.toml cannot be read"):
        load_settings({}, {}, tmp_path / "nothing.toml")


def test_the_largest_port() -> None:
    assert ServerSettings(port=65_535).port == 65_535


def test_settings_are_frozen_and_print_as_json(tmp_path: Path) -> None:
    settings = ServerSettings(keys=tmp_path / "keys.json")
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    printed = settings.printable()
    assert printed["engine"]["page_size"] == settings.engine.page_size
    assert set(printed) == set(ServerSettings.model_fields)
    assert load_settings({name: value for name, value in printed.items() if value is not None}, {}) == settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_no_public_address_without_keys(host: str) -> None:
    with pytest.raises(InvalidRequest, match=r"refusing to listen on .* without keys"):
        ServerSettings(host=host).require_safe_address(has_keys=False)
    ServerSettings(host=host).require_safe_address(has_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    ServerSettings(host=host).require_safe_address(has_keys=False)
