"""The roles that a message may have; apart from the documents, so that clients need not import those."""

from __future__ import annotations

from typing import Literal, get_args

Role = Literal["user", "assistant", "tool", "system", "developer"]
ROLES: frozenset[str] = frozenset(get_args(Role))
