"""Every `detail` is a whole sentence: `/v1` sends the detail without the title of the error.

The texts are read from the source: each call of an error's class, each fault, and what their names stand for.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service import errors, tenancy
from service.formats import openai_items, strict_json

ROOT = Path(__file__).parents[2]
CLASSES = frozenset(
    name
    for name, each in vars(errors).items()
    if isinstance(each, type) and issubclass(each, errors.ChatHistoryError)
)
WORDS_MIN = 5
# Stands for a value of the moment. It is no capital, so no detail may begin with such a value.
PLACEHOLDER = "…"
# The first words of a detail that only makes sense behind a title, or behind a question.
LEANING = re.compile(
    r"(It|Its|He|His|She|Her|They|Their|Those|These|That|There (is|are) (none|nobody|nothing)|The one|"
    r"No|Not|None|Nothing|Nobody|Neither|More|Less|This (is|was|has|takes|needs))\b"
)
# The expressions without a text in the source beside them, each with the place that its text comes from.
FROM_ELSEWHERE = {
    "service/api/appends.py: why",  # openai_items.message_faults
    "service/api/meta.py: process.why_not_ready",  # Database.why_not_ready
    "service/api/problems.py: each['msg']",  # Pydantic
    "service/api/dependencies.py: each['msg']",  # Pydantic
    "service/database/driver_errors.py: refused.detail",  # another error
    "service/database/suitability.py: refused.detail",  # another error
    "service/database/suitability.py: sentence.format(namespace=each['_id'], key=_shown(each['key']))",
    "service/errors.py: each['msg']",  # Pydantic
    "service/formats/bson_codec.py: why",  # strict_json.key_fault
    "service/formats/strict_json.py: why",  # strict_json._fault
    "service/history/new_messages.py: error.errors()[0]['msg']",  # Pydantic
    "service/history/new_messages.py: fields.why",  # strict_json._object
}


def detail_fault(text: str) -> str | None:
    """Return what is wrong with a detail, or None."""
    if not text[:1].isupper():
        return "does not begin with a capital"
    if not text.endswith("."):
        return "does not end with a full stop"
    if len(text.split()) < WORDS_MIN:
        return f"has fewer than {WORDS_MIN} words"
    if (leaning := LEANING.match(text)) is not None:
        return f"begins with {leaning[0]!r}"
    return None


def why_fault(text: str) -> str | None:
    """Return what is wrong with the text of a fault, which stands between the place and a full stop."""
    if text[:1].isupper():
        return "begins with a capital"
    if text.endswith("."):
        return "ends with a full stop, as the detail does by itself"
    if len(text.split()) < 2:
        return "is one word"
    return None


@dataclass
class Texts:
    """The texts of one module's errors and faults, with the expressions that no text was found for."""

    module: str
    tree: ast.Module
    details: dict[int, list[str]] = field(default_factory=dict)
    whys: dict[int, list[str]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)

    def collect(self) -> None:
        """Read the module; a function that passes its parameter on as a text is read at its calls."""
        for site, argument, kind in self._sites():
            texts = list(self._rendered(argument, self.tree))
            if not texts:
                self.unknown.add(f"{self.module}: {ast.unparse(argument)}")
            kind.setdefault(site.lineno, []).extend(texts)

    def _sites(self) -> Iterator[tuple[ast.expr, ast.expr, dict[int, list[str]]]]:
        helpers = self._helpers()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "msg" and not self._is_parameter(value):
                        yield node, value, self.whys
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).removeprefix("errors.")
            if name in CLASSES:
                yield node, node.args[0] if node.args else ast.Constant(""), self.details
            elif (name in {"InvalidRequest.at", "Fault"} or name in helpers) and not self._is_parameter(
                node.args[1]
            ):
                yield node, node.args[1], self.whys

    def _helpers(self) -> set[str]:
        """Return the functions whose second parameter is the text of a fault."""
        functions = [each for each in ast.walk(self.tree) if isinstance(each, ast.FunctionDef)]
        return {each.name for each in functions if [arg.arg for arg in each.args.args][1:2] == ["why"]}

    def _is_parameter(self, value: ast.expr) -> bool:
        """Tell whether a text is the parameter `why` of the function around, which is read at its calls."""
        return isinstance(value, ast.Name) and any(
            value in ast.walk(each) and value.id in {arg.arg for arg in each.args.args}
            for each in ast.walk(self.tree)
            if isinstance(each, ast.FunctionDef)
        )

    def _rendered(self, value: ast.expr, tree: ast.Module) -> Iterator[str]:
        """Yield every text that an expression may be, as far as the source tells."""
        match value:
            case ast.Constant(value=str(text)):
                yield text
            case ast.JoinedStr(values=parts):
                yield "".join(self._part(each, tree) for each in parts)
            case ast.BinOp(left=left, op=ast.Add()):
                yield from (text + PLACEHOLDER for text in self._rendered(left, tree))
            case ast.IfExp(body=one, orelse=other):
                yield from self._rendered(one, tree)
                yield from self._rendered(other, tree)
            case ast.Call(func=ast.Attribute(value=ast.Name() as template, attr="format")):
                texts = self._rendered(template, tree)
                yield from (re.sub(r"\{\w+\}", PLACEHOLDER, text) for text in texts)
            case ast.Name(id=name):
                for origin, assigned in assignments(tree, name):
                    yield from filter(None, self._rendered(assigned, origin))

    def _part(self, part: ast.expr, tree: ast.Module) -> str:
        value = part.value if isinstance(part, ast.FormattedValue) else part
        return next(self._rendered(value, tree), PLACEHOLDER)


def assignments(tree: ast.Module, name: str) -> Iterator[tuple[ast.Module, ast.expr]]:
    """Yield what a name stands for, in its own module or in the module that it is imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and [ast.unparse(each) for each in node.targets] == [name]:
            yield tree, node.value
        elif isinstance(node, ast.ImportFrom) and name in {each.name for each in node.names}:
            source = ROOT / f"{(node.module or '').replace('.', '/')}.py"
            if source.exists() and source.is_relative_to(ROOT / "service"):
                yield from assignments(ast.parse(source.read_text()), name)


def modules() -> list[Texts]:
    found = []
    for path in sorted((ROOT / "service").rglob("*.py")):
        texts = Texts(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text()))
        texts.collect()
        found.append(texts)
    return found


MODULES = modules()


def test_every_detail_is_a_sentence_that_stands_without_its_title() -> None:
    faults = [
        f"{each.module}:{line}: {text!r} {fault}"
        for each in MODULES
        for line, texts in each.details.items()
        for text in texts
        if (fault := detail_fault(text)) is not None
    ]
    assert not faults, "\n".join(faults)


def test_every_fault_is_a_clause_that_goes_on_from_its_place() -> None:
    faults = [
        f"{each.module}:{line}: {text!r} {fault}"
        for each in MODULES
        for line, texts in each.whys.items()
        for text in texts
        if (fault := why_fault(text)) is not None
    ]
    assert not faults, "\n".join(faults)


def test_no_text_of_an_error_is_overlooked() -> None:
    assert {each for texts in MODULES for each in texts.unknown} == FROM_ELSEWHERE
    assert sum(len(texts) for each in MODULES for texts in each.details.values()) > 50
    assert sum(len(texts) for each in MODULES for texts in each.whys.values()) > 20


def test_the_faults_that_functions_return_are_clauses_too() -> None:
    surrogate = json.loads(r'"\ud800"')
    texts = [
        *openai_items.message_faults({"type": "message", "role": 1, "content": 2}).values(),
        *(strict_json.key_fault(key) for key in (1, "\0", "." * 1_000, surrogate)),
        tenancy.ID_RULE,
    ]
    assert [why_fault(text or "") for text in texts] == [None] * 7


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It takes the scope 'admin'.",
        "There is none but yourself.",
        "There is none in this request.",
        "The one in this request is not, or not any more.",
        "No id has a slash.",
        "Not complete after 30000 ms.",
        "More than 33554432 bytes.",
        f"{PLACEHOLDER} bytes are free, and {PLACEHOLDER} are kept.",
        "Nothing was stored.",
        "This is no export of version 1.",
        "Not Found",
        "the body ended before it was complete.",
        "The service has not reached the database yet",
    ],
)
def test_a_detail_that_leans_on_its_title_is_found(text: str) -> None:
    assert detail_fault(text) is not None


@pytest.mark.parametrize("text", ["Must be an object", "must be an object.", "wrong", ""])
def test_a_fault_that_does_not_go_on_from_its_place_is_found(text: str) -> None:
    assert why_fault(text) is not None
