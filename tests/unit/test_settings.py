"""Settings: all of them documented, each from its variable."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.embedded import data_directory
from service.settings import ENGINE_RECORD, Settings, host_name, without_password
from service.settings.checks import spelling_distance

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "settings.md"


def test_the_page_of_settings_is_what_is_generated() -> None:
    assert all(field.description for field in Settings.model_fields.values())
    generate = [sys.executable, str(ROOT / "docs" / "generate_settings.py")]
    generated = subprocess.run(generate, capture_output=True, text=True, timeout=30, check=True).stdout
    assert PAGE.read_text() == generated, "Run `make settings`."


def test_every_variable_that_the_documents_name_is_on_the_page_of_settings() -> None:
    known = set(re.findall(r"CHAT_[A-Z_]+", PAGE.read_text()))
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        named = set(re.findall(r"CHAT_[A-Z_]*[A-Z]\b(?!_)", page.read_text()))
        assert named <= known, (page, named - known)


def test_a_variable_sets_it_and_a_wrong_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAT_PAGE_ITEMS_MAX", "7")
    assert Settings(_env_file=None).page_items_max == 7
    monkeypatch.setenv("CHAT_PAGE_ITEMS_MAX", "seven")
    with pytest.raises(ValidationError):
        Settings(_env_file=None)


def test_a_dotenv_file_sets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("CHAT_PORT=1234\nOTHER=1\n")
    monkeypatch.chdir(tmp_path)
    assert Settings().port == 1234


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    assert Settings(_env_file=None).host == "127.0.0.1"


def test_a_retention_of_one_tenant_alone_is_a_retention() -> None:
    def shortest(**settings: Any) -> int | None:
        return Settings(_env_file=None, **settings).shortest_retention_days

    assert shortest() is None
    assert shortest(retention_days=30) == 30
    assert shortest(retention_days_by_tenant={"acme": 10}) == 10
    assert shortest(retention_days=30, retention_days_by_tenant={"acme": 10, "keeps": 3650}) == 10
    for wrong in (0, -1):
        with pytest.raises(ValidationError):
            shortest(retention_days_by_tenant={"acme": wrong})


def refused(**settings: Any) -> str:
    """What is said of settings that must be refused."""
    with pytest.raises(ValidationError) as refusal:
        Settings(**{"_env_file": None, **settings})
    return "\n".join(str(each["msg"]) for each in refusal.value.errors())


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("CHAT_AUHT", "CHAT_AUTH"),
        ("chat_auht", "CHAT_AUTH"),
        ("CHAT__AUTH", "CHAT_AUTH"),
        ("CHAT_APIKEY", "CHAT_API_KEY"),
        ("CHAT_API_KEYS", "CHAT_API_KEY"),
        ("CHAT_KEY_API", "CHAT_API_KEY"),
        ("CHAT_MONGODB_URI", "CHAT_MONGODB_URL"),
        ("CHAT_MONGO_URL", "CHAT_MONGODB_URL"),
        ("CHAT_MAX_PAGE_ITEMS", "CHAT_PAGE_ITEMS_MAX"),
        ("CHAT_DATABASE_TIMEOUT", "CHAT_DATABASE_TIMEOUT_MS"),
        ("CHAT_TRUSTED_PROXY", "CHAT_TRUSTED_PROXIES"),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_refused_and_the_setting_is_named(
    variable: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "key")
    said = refused()
    assert f"{variable.upper()}. {meant} was meant" in said
    monkeypatch.delenv(variable)
    (tmp_path / ".env").write_text(f"{variable}=key\n")
    monkeypatch.chdir(tmp_path)
    assert f"{variable.upper()}. {meant} was meant" in refused(_env_file=".env")


def test_every_setting_is_known_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(f"CHAT_{name.upper()}", "1")
    assert "There is no setting" not in refused()


def test_a_variable_of_another_program_is_named_and_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [
        "CHAT_API_URL",
        "CHAT_MAX_TOKENS",
        "CHAT_MODEL",
        "CHAT_PATH",
        "CHAT_RETRIES",
        "CHAT_TEMPERATURE",
    ]
    for name in [*others, "CHAT_HISTORY_URL", "CHAT_HISTORY_API_KEY", "CHATS_AUTH"]:
        monkeypatch.setenv(name, "1")
    assert Settings(_env_file=None).unknown_variables == tuple(others)


@pytest.mark.parametrize("variable", ["CHAT_API_KEY", "CHAT_MONGODB_URL", "CHAT_METRICS_TOKEN", "CHAT_HOST"])
def test_a_setting_that_is_empty_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, " ")
    assert f"{variable} is empty" in refused()


def test_a_setting_in_capitals_and_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAT_AUTH", "key")
    monkeypatch.setenv("chat_auth", "none")
    assert "CHAT_AUTH is set 2 times" in refused()


JWT = {"auth": "jwt", "jwt_issuer": "i", "jwt_audience": "a"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"api_key": "s"}, "CHAT_API_KEY would have no effect"),
        ({"api_key": "s", "auth": "none"}, "Set CHAT_AUTH=key"),
        ({"api_key": "s", **JWT, "jwt_secret": "s"}, "CHAT_API_KEY would have no effect"),
        ({"key_cache_ms": 0}, "CHAT_KEY_CACHE_MS would have no effect"),
        ({"failures_per_address": "5/minute"}, "CHAT_FAILURES_PER_ADDRESS would have no effect"),
        ({"jwt_secret": "s"}, "CHAT_JWT_SECRET would have no effect"),
        ({"jwt_jwks_url": "https://i", "auth": "key"}, "Set CHAT_AUTH=jwt"),
        ({"jwt_tenant_claim": "org"}, "CHAT_JWT_TENANT_CLAIM would have no effect"),
        ({**JWT, "jwt_secret": "s", "jwt_algorithms": ["RS256"]}, "HS256 alone"),
        ({**JWT, "jwt_secret": "s", "jwt_jwks_cache_s": 9}, "CHAT_JWT_JWKS_CACHE_S would have no effect"),
        ({"tls_key_password": "p"}, "CHAT_TLS_KEY_PASSWORD would have no effect"),
        ({"mongodb_tls_ca": __file__}, "Set CHAT_MONGODB_URL"),
        ({"metrics_token": "t"}, "Set CHAT_METRICS=true"),
        ({"metrics": True, "auth": "key"}, "needs CHAT_METRICS_TOKEN"),
        ({"page_items_default": 9, "page_items_max": 8}, "CHAT_PAGE_ITEMS_DEFAULT is more than"),
        ({"mongodb_url": "localhost:27017"}, "must begin with mongodb://"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Any, says: str) -> None:
    assert says in refused(**settings)


def test_a_setting_that_is_merely_unused_is_no_contradiction() -> None:
    on_mongodb: dict[str, Any] = {
        "mongodb_url": "mongodb://db",
        "data_dir": "x",
        "embedded_port": 1,
        "insecure": True,
    }
    assert Settings(_env_file=None, **on_mongodb, auth="key", api_key="s", page_items_max=7).auth == "key"


def test_a_dotenv_file_that_somebody_else_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".env"
    file.write_text("CHAT_PORT=1234\n")
    monkeypatch.chdir(tmp_path)
    for mode in (0o620, 0o602, 0o666):
        file.chmod(mode)
        assert "chmod go-w" in refused(_env_file=".env")
    file.chmod(0o644)
    assert Settings().env_file_read == file
    real = os.geteuid() + 1000
    monkeypatch.setattr(os, "geteuid", lambda: real)
    if file.stat().st_uid:  # root's is everybody's
        assert "belongs to another user" in refused(_env_file=".env")
    else:
        os.chown(file, real + 1, -1)
        assert "belongs to another user" in refused(_env_file=".env")
        os.chown(file, 0, -1)
        assert Settings().port == 1234


def test_the_password_of_the_database_is_in_no_text_of_the_settings() -> None:
    url = "mongodb://ada:s3cret@db1,db2/chat?replicaSet=rs0&tlsCertificateKeyFilePassword=s3cret"
    settings = Settings(_env_file=None, mongodb_url=url)
    assert settings.url == url
    assert "s3cret" not in repr(settings) + str(settings) + settings.database_name


@pytest.mark.parametrize(
    ("url", "without"),
    [
        ("mongodb://ada:p@ss/w:rd@db/chat", "mongodb://ada@db/chat"),
        ("mongodb://ada@db", "mongodb://ada@db"),
        ("mongodb://db:27017/chat?w=1", "mongodb://db:27017/chat?w=1"),
        ("mongodb+srv://ada:p@db", "mongodb+srv://ada@db"),
        ("mongodb://db/?proxyPassword=p&w=1", "mongodb://db/?proxyPassword=***&w=1"),
        (
            "mongodb://db/?w=1&authMechanismProperties=AWS_SESSION_TOKEN:t",
            "mongodb://db/?w=1&authMechanismProperties=***",
        ),
    ],
)
def test_a_url_is_shown_without_its_password_and_its_secret_options(url: str, without: str) -> None:
    assert without_password(url) == without


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        ("localhost", "localhost"),
        (" Chat.Example.COM. ", "chat.example.com"),
        ("chat.example.com:8000", "chat.example.com"),
        ("127.0.0.1:", "127.0.0.1"),
        ("[::1]:8000", "[::1]"),
        ("0:0:0:0:0:0:0:1", "[::1]"),
        ("[2001:DB8::0:1]", "[2001:db8::1]"),
        ("", None),
        (".", None),
        (":8000", None),
        ("chat:port", None),
        ("chat/path", None),
        ("ada@chat", None),
        ("[::1", None),
        ("[1:2]", None),
        ("chät", None),
    ],
)
def test_a_host_is_compared_by_its_name_alone(authority: str, name: str | None) -> None:
    assert host_name(authority) == name


@pytest.mark.parametrize("hosts", ["", "a,", "a b", "a,http://b", "[x]"])
def test_hosts_that_are_no_names_are_refused(hosts: str) -> None:
    assert "is no name or address of a host" in refused(hosts=hosts)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("CHAT_PORT", "CHAT_PORT", 0),
        ("CHAT_PROT", "CHAT_PORT", 1),  # two neighbours swapped
        ("CHAT_PRT", "CHAT_PORT", 1),  # a letter less
        ("CHAT_POORT", "CHAT_PORT", 1),  # a letter more
        ("CHAT_PERT", "CHAT_PORT", 1),  # another letter
        ("CHAT_APIKEY", "CHAT_API_KEY", 0),  # underscores do not count
        ("CHAT_KEY_API", "CHAT_API_KEY", 0),  # nor does the order of words
        ("CHAT_MODEL", "CHAT_PORT", 4),
        ("", "CHAT", 4),
    ],
)
def test_typing_mistakes_are_counted(one: str, other: str, distance: int) -> None:
    assert spelling_distance(one, other) == spelling_distance(other, one) == distance


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"host": "127.0.0.1", "port": 1}'])
def test_a_file_that_is_no_record_of_an_engine_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / ENGINE_RECORD).write_text(text)
    with pytest.raises(OSError, match="is no record of an engine"):
        Settings(_env_file=None, data_dir=tmp_path).engine_record()


def test_the_url_of_the_engine_is_read_from_its_record(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path)
    with pytest.raises(FileNotFoundError):
        _ = settings.url
    (tmp_path / ENGINE_RECORD).write_text(data_directory.record(None, "s3cret", for_service=True))
    with pytest.raises(OSError, match="No engine runs"):
        _ = settings.url
    (tmp_path / ENGINE_RECORD).write_text(data_directory.record(1234, "s3cret", for_service=True))
    assert settings.url.startswith("mongodb://chat-history:s3cret@127.0.0.1:1234/chat_history?")
    assert "s3cret" not in settings.database_name
