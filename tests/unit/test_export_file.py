"""Export files: read strictly, line by line, with the line of each fault."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest

from service.errors import ChatHistoryError, ConversationIdTaken
from service.user_data import UserData
from service.user_data.exporting import ImportCounts, import_file

TIME = "2026-01-01T00:00:00Z"
HEAD = {"type": "export", "version": 1, "user_id": "ada", "created_at": "2026-01-01T00:00:00Z"}


def conversation(key: str, user_id: str = "ada") -> dict[str, Any]:
    return {"type": "conversation", "id": key, "user_id": user_id, "created_at": TIME, "updated_at": TIME}


def message(seq: int) -> dict[str, Any]:
    return {"type": "message", "message": {"seq": seq, "created_at": TIME}}


def end(conversations: int) -> dict[str, Any]:
    return {"type": "end", "conversations": conversations, "messages": 0}


class Imports:
    """Takes conversations; those of `known` are stored already, and `taken` is another's."""

    def __init__(self) -> None:
        self.imported: dict[str, list[int]] = {}
        self.dry_runs: set[bool] = set()

    async def import_conversation(
        self, conversation: dict[str, Any], messages: Iterable[dict[str, Any]], *, dry_run: bool
    ) -> int | None:
        assert "type" not in conversation
        self.dry_runs.add(dry_run)
        seqs = [each["seq"] for each in messages]
        if conversation["id"] == "taken":
            raise ConversationIdTaken("It is taken.")
        self.imported[conversation["id"]] = seqs
        return None if conversation["id"] == "known" else len(seqs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ada.ndjson"


def write(path: Path, lines: Iterable[Any]) -> int:
    """Write an export, of JSON or of lines as they are, and return its size."""
    encoded = (each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines)
    return path.write_bytes(b"".join(each + b"\n" for each in encoded))


async def run(path: Path, *lines: Any, **options: Any) -> tuple[Imports, ImportCounts]:
    write(path, lines)
    imports, counts = Imports(), ImportCounts()
    await import_file(cast(UserData, imports), path, counts, **options)
    return imports, counts


async def test_each_conversation_is_imported_with_its_messages(path: Path) -> None:
    sizes: list[int] = []
    lines = [HEAD, conversation("a"), message(1), message(2), conversation("known"), message(1), end(2)]
    imports, counts = await run(path, *lines, dry_run=True, progress=sizes.append)
    assert imports.imported == {"a": [1, 2], "known": [1]}
    assert counts == ImportCounts(conversations=1, messages=2, already_stored=1, user_id="ada")
    assert imports.dry_runs == {True}
    assert sizes == sorted(sizes)
    assert sizes[-1] == write(path, lines)


@pytest.mark.parametrize(
    ("lines", "number", "why"),
    [
        ([], 1, "not an export of version 1"),
        ([HEAD | {"version": 2}], 1, "not an export of version 1"),
        ([conversation("a")], 1, "not an export of version 1"),
        ([b"{"], 1, "Expecting property name"),
        ([b"\xff"], 1, "not UTF-8"),
        ([b"[]"], 1, "must be a JSON object"),
        ([HEAD, b'{"type": "end", "type": "end"}'], 2, "stands twice"),
        ([HEAD], 2, "cut short"),
        ([HEAD, end(1)], 2, "cut short"),
        ([HEAD, conversation("a"), message(1)], 4, "cut short"),
        ([HEAD, conversation("a"), message(1), end(2)], 4, "cut short"),
        ([HEAD, conversation("a"), {"type": "message", "message": 1}, end(1)], 3, "must be a JSON object"),
        ([HEAD, message(1), end(0)], 2, "cut short"),
        ([HEAD, conversation("taken"), end(1)], 3, "It is taken."),
    ],
)
async def test_a_fault_is_told_with_its_line(path: Path, lines: list[Any], number: int, why: str) -> None:
    with pytest.raises(ChatHistoryError) as caught:
        await run(path, *lines)
    assert caught.value.detail.startswith(f"{path}, line {number}: ")
    assert why in caught.value.detail


async def test_an_import_of_one_user_takes_no_other_users_lines(path: Path) -> None:
    imports, _ = await run(path, HEAD, conversation("a"), end(1), user_id="ada")
    assert list(imports.imported) == ["a"]
    for lines in ([HEAD | {"user_id": "bob"}, end(0)], [HEAD, conversation("b", "bob"), end(1)]):
        with pytest.raises(ChatHistoryError, match="`user_id` of this line is not 'ada'"):
            await run(path, *lines, user_id="ada")


@pytest.mark.parametrize("ending", [b"", b"\r"])
async def test_a_byte_order_mark_and_any_line_ending_are_read(path: Path, ending: bytes) -> None:
    lines = [json.dumps(each).encode() + ending for each in (HEAD, conversation("a"), message(1), end(1))]
    imports, counts = await run(path, codecs.BOM_UTF8 + lines[0], *lines[1:])
    assert imports.imported == {"a": [1]}
    assert counts.changed == {}


async def test_a_byte_order_mark_is_one_at_the_beginning_only(path: Path) -> None:
    with pytest.raises(ChatHistoryError, match="line 2"):
        await run(path, HEAD, codecs.BOM_UTF8 + json.dumps(end(0)).encode())


async def test_what_was_imported_before_a_fault_is_counted(path: Path) -> None:
    write(path, [HEAD, conversation("a"), message(1), conversation("taken")])
    counts = ImportCounts()
    with pytest.raises(ConversationIdTaken):
        await import_file(cast(UserData, Imports()), path, counts)
    assert (counts.conversations, counts.messages) == (1, 1)
