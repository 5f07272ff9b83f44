"""When a conversation is removed: at its `expires_at`, or when it had no activity for its tenant's days.

`due_at` is the time at which the sweep looks at a conversation. Every write that can bring the removal
forward sets it, and a write that only puts the removal off, such as an append, leaves it as it is, because
each move would cost an append two writes to an index. So `due_at` is never too late, and where it is too
early the sweep moves it, at most once in each retention (test_due_times).
"""

from __future__ import annotations

import contextlib
import json
from datetime import datetime, timedelta

from service.formats.strict_json import Json
from service.settings import Settings
from service.tenancy import tenant_of


def due_at(settings: Settings, key: str, *, expires_at: datetime | None, active: datetime) -> datetime | None:
    """Return the time from which a conversation is removed if nobody writes to it any more, or None.

    `active` is the time of its last activity.
    """
    times = [] if expires_at is None else [expires_at]
    days = _days(settings, key)
    if days is not None:
        with contextlib.suppress(OverflowError):  # such a time is beyond the year 9999
            times.append(active + timedelta(days=days))
    return min(times, default=None)


def still_due(settings: Settings, key: str, *, expires_at: datetime | None, now: datetime) -> Json:
    """Return a filter that a conversation which was due meets, unless somebody has put its removal off."""
    if expires_at is not None and expires_at < now:
        return {"expires_at": {"$lt": now}}
    return {"active_at": {"$lt": now - timedelta(days=_days(settings, key) or 0)}}


def fingerprint(settings: Settings) -> str:
    """Return a text that is another one for settings with which other conversations may be due.

    It names the fields that the walk of the maintenance fills in, so a new version begins a new walk.
    """
    by_tenant = sorted(settings.retention_days_by_tenant.items())
    return json.dumps(["active_at", settings.retention_days, by_tenant])


def _days(settings: Settings, key: str) -> int | None:
    return settings.retention_days_by_tenant.get(tenant_of(key), settings.retention_days)
