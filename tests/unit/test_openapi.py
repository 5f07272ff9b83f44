"""The API's description: valid, and nothing in it changes unless somebody means it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types
from openapi_spec_validator import OpenAPIV31SpecValidator

from service.api.examples import EXAMPLES

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "openapi.json"
DESCRIPTION: dict[str, Any] = json.loads(DOCUMENT.read_text())
CALLS = {call["operationId"]: call for calls in DESCRIPTION["paths"].values() for call in calls.values()}


def test_the_description_of_the_api_changes_only_on_purpose() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHAT_")}
    generate = [sys.executable, str(ROOT / "docs" / "generate_openapi.py")]
    generated = subprocess.run(
        generate, env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert DOCUMENT.read_text() == generated, "If the change is meant, run `make openapi`."


def test_the_description_of_the_api_is_valid_openapi() -> None:
    errors = [f"{'/'.join(map(str, error.path))}: {error.message}" for error in _errors()]
    assert errors == []


def _errors() -> Any:
    return OpenAPIV31SpecValidator(DESCRIPTION).iter_errors()


def test_every_reference_leads_somewhere() -> None:
    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(DESCRIPTION)))
    assert len(references) > 10
    for reference in references:
        assert reference.startswith("#/"), reference
        there: Any = DESCRIPTION
        for step in reference[2:].split("/"):
            assert step in there, reference
            there = there[step]


def test_operation_ids_are_short_and_stand_once() -> None:
    ids = [call["operationId"] for calls in DESCRIPTION["paths"].values() for call in calls.values()]
    assert len(ids) == len(set(ids))
    assert [each for each in ids if not re.fullmatch(r"[a-z]+(_[a-z]+){0,3}", each)] == []


@pytest.mark.parametrize("operation_id", EXAMPLES)
def test_every_example_is_what_the_schemas_say(operation_id: str) -> None:
    call, example = CALLS[operation_id], EXAMPLES[operation_id]
    answer = call["responses"][example.status]["content"]["application/json"]
    assert answer["example"] == example.answer
    _validate(answer["schema"], answer["example"])
    named = {each["name"]: each for each in call.get("parameters", [])}
    for name, value in example.parameters.items():
        assert named[name]["example"] == value
        _validate(named[name]["schema"], value)
    body = call.get("requestBody", {}).get("content", {}).get("application/json", {})
    assert body.get("examples", {}) == {name: {"value": value} for name, value in example.bodies.items()}
    for value in example.bodies.values():
        _validate(body["schema"], value)


def _validate(schema: dict[str, Any], value: Any) -> None:
    Draft202012Validator({**schema, "components": DESCRIPTION["components"]}).validate(value)
