"""Reads an export from a file, strictly, a conversation at a time; memory stays that of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from service import payloads
from service.errors import ChatHistoryError, InvalidRequest
from service.lifecycle import FORMAT_VERSION, Lifecycle

Json = dict[str, Any]
Progress = Callable[[int], None]


@dataclass
class Imported:
    """What an import stored, and how many conversations were there already."""

    conversations: int = 0
    messages: int = 0
    there: int = 0
    user_id: str | None = None  # whose export it says that it is


class _Lines:
    """The lines of a file as JSON objects, with one line of looking ahead."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self.number = 0
        self.next: Json | None = None
        self.advance()

    def advance(self) -> None:
        """Go on to the next line; `next` is None behind the last."""
        line = self._file.readline()
        self.number += 1
        self._progress(self._file.tell())
        if not line:
            self.next = None
            return
        value = payloads.parse(line)
        payloads.check(value)
        if not isinstance(value, dict):
            raise InvalidRequest("An object is needed.")
        self.next = value

    def messages(self) -> Iterator[Json]:
        """Yield the messages that follow, up to the next conversation or the end."""
        while self.next is not None and self.next.get("type") == "message":
            message = self.next.get("message")
            if not isinstance(message, dict):
                raise InvalidRequest("`message` must be an object.")
            yield message
            self.advance()


async def import_file(
    lifecycle: Lifecycle,
    path: Path,
    done: Imported,
    *,
    user_id: str | None = None,
    dry_run: bool = False,
    progress: Progress = lambda _: None,
) -> None:
    """Import one export, of the user `user_id` alone if that is given.

    Counts into `done`, which is right also where it fails. Raises InvalidRequest, with the line, and what
    `Lifecycle.restore` raises.
    """
    with path.open("rb") as file:
        lines: _Lines | None = None
        try:
            lines = _Lines(file, progress)
            await _import(lifecycle, lines, done, user_id, dry_run=dry_run)
        except ChatHistoryError as error:
            number = lines.number if lines is not None else 1
            raise type(error)(
                f"{path}, line {number}: {error.detail or error.title}", error.faults
            ) from error


async def _import(
    lifecycle: Lifecycle, lines: _Lines, done: Imported, user_id: str | None, *, dry_run: bool
) -> None:
    head = lines.next
    if head is None or head.get("type") != "export" or head.get("version") != FORMAT_VERSION:
        raise InvalidRequest(f"This is no export of version {FORMAT_VERSION}.")
    _require_owner(head, user_id)
    done.user_id = str(head.get("user_id"))
    lines.advance()
    total = 0
    while lines.next is not None and lines.next.get("type") == "conversation":
        _require_owner(lines.next, user_id)
        conversation = {name: value for name, value in lines.next.items() if name != "type"}
        lines.advance()
        stored = await lifecycle.restore(conversation, lines.messages(), dry_run=dry_run)
        total += 1
        done.there += stored is None
        done.conversations += stored is not None
        done.messages += stored or 0
    end = lines.next
    if end is None or end.get("type") != "end" or end.get("conversations") != total:
        raise InvalidRequest("The export was cut short: its last line is missing, or has another count.")


def _require_owner(line: Json, user_id: str | None) -> None:
    """Raise InvalidRequest for what is another user's; `restore` asks the same of each message."""
    if user_id is not None and line.get("user_id") != user_id:
        raise InvalidRequest(f"`user_id` is not {user_id!r}, the only user that this import takes.")
