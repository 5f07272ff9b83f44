"""Every setting with values that cannot be meant: a sentence that names the variable, and no traceback."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from service.cli import context
from service.settings import Settings

# Texts that may be anything, or that only the operating system, the database or the issuer can judge.
ANY_TEXT = {
    *("host", "data_dir", "api_key", "metrics_token", "tls_key_password"),
    *("jwt_issuer", "jwt_audience", "jwt_secret", "jwt_tenant_claim", "jwt_public_key"),
}
WRONG: dict[str, list[str]] = {
    "hosts": ["a b", "http://a", "a,"],
    "trusted_proxies": ["proxy", "10.0.0.1/8", "10.0.0.1,", "*,10.0.0.1"],
    "cors_origins": ["localhost:3000", "http://a/b", "http://a,", "[", "[1]", '{"a": 1}', "http://a b"],
    "jwt_jwks_url": ["issuer", "https://", "ftp://issuer", "https://[", "https://issuer:x"],
    "jwt_algorithms": ["HS256", "none", "[]", "RS256,", "[", "rs256"],
    "rate_per_key": ["many", "5", "0x/minute"],
    "rate_per_address": ["many"],
    "failures_per_address": ["many"],
    "mongodb_url": ["localhost:27017", "http://db", "mongodb:/db"],
    "database": ["a.b", "a/b", "a" * 39, "ä"],
    "embedded_cache": ["1", "1T", "0G", "-1G", "1 G", "1000000G"],
    "default_user_id": ["x" * 2_000],
    "retention_days_by_tenant": ["acme", "acme=", "=1", "acme=x", "acme=0", "{", '{"acme": 0}', "acme=1,"],
}


def wrong_values(name: str, annotation: Any) -> Iterator[str]:
    kinds = [each for each in (annotation, *get_args(annotation)) if each is not type(None)]
    yield " "
    if int in kinds or any(get_args(each)[:1] == (int,) for each in kinds):
        yield from ("seven", "1.5", "-1", str(10**20))
    if bool in kinds:
        yield "perhaps"
    if any(get_origin(each) is Literal for each in kinds):
        yield "nonsense"
    if name.startswith(("tls_", "mongodb_tls_")) and name not in ANY_TEXT:
        yield from ("missing.pem", "folder", "pipe")
    yield from WRONG.get(name, [])


CASES = [
    (name, value)
    for name, field in Settings.model_fields.items()
    for value in wrong_values(name, field.annotation)
]


@pytest.fixture
def said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """What a command says, line by line, of the settings that it refuses."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    os.mkfifo("pipe")

    def say(**settings: Any) -> list[str]:
        for name, value in settings.items():
            monkeypatch.setenv(f"CHAT_{name.upper()}", str(value))
        with pytest.raises(typer.Exit) as ended:
            context.read_settings()
        assert ended.value.exit_code == 1
        out, err = capsys.readouterr()
        assert out == ""
        return err.removeprefix("chat-history: ").splitlines()

    return say


def test_every_setting_is_tried_with_a_value_of_a_wrong_kind() -> None:
    tried = {name for name, value in CASES if value.strip()}
    assert tried | ANY_TEXT == {*Settings.model_fields}
    assert len(CASES) > 150


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_wrong_value_is_answered_with_one_sentence_that_names_the_variable(
    name: str, value: str, said: Callable[..., list[str]]
) -> None:
    variable = f"CHAT_{name.upper()}"
    (line,) = said(**{name: value})
    assert line.startswith(variable)
    assert line.endswith(".")
    assert "Value error" not in line
    assert not re.search(r"\b[a-z]+_[a-z_]+\b", line.replace(value, "")), "a name from the code"


@pytest.mark.parametrize(
    ("settings", "variables"),
    [
        ({"auth": "jwt"}, ["CHAT_JWT_JWKS_URL", "CHAT_JWT_ISSUER"]),
        ({"auth": "key+jwt", "jwt_secret": "s"}, ["CHAT_JWT_ISSUER and CHAT_JWT_AUDIENCE"]),
        ({"tls_cert": __file__}, ["CHAT_TLS_CERT and CHAT_TLS_KEY"]),
        ({"tls_key": __file__}, ["CHAT_TLS_CERT and CHAT_TLS_KEY"]),
        ({"tls_cert": __file__, "tls_key": __file__}, ["CHAT_TLS_CERT and CHAT_TLS_KEY cannot be used"]),
        ({"mongodb_url": "mongodb://db", "mongodb_tls_ca": __file__}, ["CHAT_MONGODB_TLS_CA cannot be used"]),
        ({"mongodb_url": "mongodb://db", "mongodb_tls_cert": __file__}, ["CHAT_MONGODB_TLS_CERT cannot"]),
        (
            {"mongodb_url": "mongodb://db/one", "database": "two"},
            ["CHAT_MONGODB_URL names the database 'one'"],
        ),
        ({"mongodb_url": "mongodb+srv://a:b@db/o%6Ee?w=1", "database": "two"}, ["the database 'one'"]),
    ],
)
def test_settings_that_do_not_go_together_are_answered_with_sentences(
    settings: dict[str, str], variables: list[str], said: Callable[..., list[str]]
) -> None:
    lines = said(**settings)
    assert len(lines) == len(variables)
    for line, variable in zip(lines, variables, strict=True):
        assert variable in line
        assert line.endswith(".")


JWT = {"auth": "jwt", "jwt_issuer": "i", "jwt_audience": "a"}


def private_pem(key: Any) -> str:
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return str(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain), "ascii")


def public_pem(key: Any) -> str:
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(key.public_key().public_bytes(serialization.Encoding.PEM, info), "ascii")


def test_a_public_key_that_could_verify_nothing_is_refused(said: Callable[..., list[str]]) -> None:
    key = rsa.generate_private_key(65537, 2048)
    Path("private.pem").write_text(private_pem(key))
    Path("public.pem").write_text(public_pem(key))
    Path("binary.pem").write_bytes(b"\xff\xfe")
    for wrong in ("missing.pem", "folder", "binary.pem", __file__, "private.pem", "-----BEGIN"):
        (line,) = said(**JWT, jwt_public_key=wrong)
        assert line.startswith("CHAT_JWT_PUBLIC_KEY")
        assert line.endswith(".")
    assert "ES256" in said(jwt_public_key="public.pem", jwt_algorithms="ES256")[0]
    for right in ("public.pem", public_pem(key), public_pem(ed25519.Ed25519PrivateKey.generate())):
        assert Settings(_env_file=None, **JWT, jwt_public_key=right, jwt_algorithms=["RS256", "EdDSA"])  # type: ignore[arg-type]


def test_tokens_with_asymmetric_keys_name_the_extra_that_they_need(
    said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec
    monkeypatch.setattr(
        "service.settings.key_files.find_spec", lambda name: None if name == "cryptography" else find(name)
    )
    (line,) = said(**JWT, jwt_jwks_url="https://issuer.example/jwks")
    assert "pip install '.[jwt]'" in line
    monkeypatch.delenv("CHAT_JWT_JWKS_URL")
    monkeypatch.setenv("CHAT_JWT_SECRET", "s")
    assert Settings(_env_file=None).jwt_secret is not None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("cors_origins", "http://localhost:3000", ("http://localhost:3000",)),
        ("cors_origins", "https://A.example, app://b", ("https://a.example", "app://b")),
        ("cors_origins", '["https://a.example"]', ("https://a.example",)),
        ("retention_days_by_tenant", "acme=30, a=b=7", {"acme": 30, "a=b": 7}),
        ("retention_days_by_tenant", '{"acme": 30}', {"acme": 30}),
        ("trusted_proxies", "10.0.0.7, ::1,10.1.0.0/16", "10.0.0.7, ::1,10.1.0.0/16"),
        ("trusted_proxies", "*", "*"),
    ],
)
def test_a_list_is_written_with_commas_or_as_json(
    name: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"CHAT_{name.upper()}", text)
    assert getattr(Settings(_env_file=None), name) == value


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("mongodb://db", "chat_history"),
        ("mongodb://db/?w=1", "chat_history"),
        ("mongodb://ada:p@db1,db2:27017/one?w=1", "one"),
        ("mongodb+srv://db/one", "one"),
    ],
)
def test_the_name_in_the_url_is_the_name_of_the_database(url: str, name: str) -> None:
    assert Settings(_env_file=None, mongodb_url=url).database_name.startswith(f"{name!r} on mongodb")
    assert Settings(_env_file=None, mongodb_url=url, database=name)


def test_a_file_without_the_right_to_read_it_is_refused(
    said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> None:  # in place of a mode, which does not stop root
        raise PermissionError(13, "Permission denied")

    Path("closed.pem").touch()
    monkeypatch.setattr(Path, "open", denied)
    (line,) = said(mongodb_tls_ca="closed.pem")
    assert line == "CHAT_MONGODB_TLS_CA: closed.pem cannot be read (Permission denied)."
