"""Settings: all of them documented, each from its variable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.settings import Settings


def test_every_setting_says_what_it_is_and_the_readme_lists_it() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"`CHAT_{name.upper()}`" in readme, name


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
