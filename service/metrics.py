"""What is counted for Prometheus, where `CHAT_METRICS` asks for it: by route template, never by an id.

Until `enable` is called everything here does nothing, and costs nothing; what is imported here is imported
before the service starts its engine, so it is little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

_DATABASE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class _Metrics:
    """Every metric, by name."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram  # noqa: PLC0415  (slow to import, and seldom needed)

        what = ("method", "route")
        self.requests: Counter = Counter("chat_requests", "Requests answered.", (*what, "status"))
        self.seconds: Histogram = Histogram("chat_request_seconds", "How long they took.", what)
        self.database: Histogram = Histogram(
            "chat_database_seconds",
            "Round trips to the database, and how long they took.",
            ("command",),
            buckets=_DATABASE_BUCKETS,
        )
        self.database_failures: Counter = Counter(
            "chat_database_failures", "Commands that the database refused or did not answer.", ("command",)
        )
        self.counters: dict[str, Counter] = {
            "messages_appended": Counter("chat_messages_appended", "Messages stored."),
            "appends": Counter("chat_appends", "Appends stored, of one message or a batch."),
            "replays": Counter("chat_replays", "Appends that an earlier request had stored."),
            "transaction_retries": Counter("chat_transaction_retries", "Transactions run once more."),
            "engine_restarts": Counter("chat_engine_restarts", "Times that the embedded engine had ended."),
        }


_metrics: _Metrics | None = None


def enable() -> None:
    """Count from now on; once in a process."""
    global _metrics  # noqa: PLW0603  (a registry is the process's, as prometheus_client's own is)
    if _metrics is None:
        _metrics = _Metrics()


def count(name: str, by: int = 1) -> None:
    """Add to one of the plain counters."""
    if _metrics is not None:
        _metrics.counters[name].inc(by)


def request(method: str, route: str, status: int, seconds: float) -> None:
    """Note a request that was answered."""
    if _metrics is not None:
        _metrics.requests.labels(method, route, status).inc()
        _metrics.seconds.labels(method, route).observe(seconds)


def command(name: str, seconds: float, *, failed: bool) -> None:
    """Note a round trip to the database."""
    if _metrics is not None:
        _metrics.database.labels(name).observe(seconds)
        if failed:
            _metrics.database_failures.labels(name).inc()


def is_enabled() -> bool:
    """Tell whether anything is counted."""
    return _metrics is not None


def exposition() -> bytes:
    """Return all of it as Prometheus reads it."""
    from prometheus_client import generate_latest  # noqa: PLC0415

    return generate_latest()
