"""The errors that a call raises when the service answers with one."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """The service refused a call.

    `status` is the HTTP status, `type` and `detail` are those of the problem document, `errors` has the
    JSON path and the message of each fault, and `retry_after_s` is what `Retry-After` says.
    """

    def __init__(self, status: int, problem: dict[str, Any], retry_after_s: float | None = None) -> None:
        super().__init__(f"{status} {problem.get('title', '')}: {problem.get('detail', '')}".strip(": "))
        self.status = status
        self.type = str(problem.get("type", ""))
        self.detail = str(problem.get("detail", ""))
        self.errors: list[dict[str, Any]] = problem.get("errors") or []
        self.retry_after_s = retry_after_s


class NotFound(ApiError):
    """There is no such conversation or message, or it belongs to another user."""


class Conflict(ApiError):
    """The id is taken, or the idempotency key or the ids stand for another request."""


class Stale(Conflict):
    """The conversation is not as `expected_last_seq` or `expected_version` says; this call changed nothing.

    `version` and `last_seq` are the conversation's, and `missed` has the first messages behind
    `expected_last_seq`, up to 100, if that was given.
    """

    def __init__(self, status: int, problem: dict[str, Any], retry_after_s: float | None = None) -> None:
        super().__init__(status, problem, retry_after_s)
        self.version: int = problem.get("version", 0)
        self.last_seq: int = problem.get("last_seq", 0)
        self.missed: list[dict[str, Any]] = problem.get("missed") or []


class Unavailable(ApiError):
    """The service or its database was away for all the time that there was to repeat the call.

    Whether an append was stored is then not known: repeat it with the same `idempotency_key`.
    """
