"""Metrics for Prometheus, where `CHAT_METRICS` asks for them: by route template, never by an id.

Until `enable` is called, everything here does nothing and costs nothing. This module imports little, because
it is imported before the service starts its engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

_DATABASE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class _Metrics:
    """Every metric, by name."""

    def __init__(self) -> None:
        from prometheus_client import (  # noqa: PLC0415  (slow to import, and seldom needed)
            Counter,
            Gauge,
            Histogram,
        )

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
        self.missing_indexes: Gauge = Gauge(
            "chat_missing_indexes", "Indexes that are not there yet, as this process saw them last."
        )
        self.last_sweep: Gauge = Gauge(
            "chat_last_sweep_timestamp_seconds", "The end of this process's latest sweep without a failure."
        )
        self.oldest_due: Gauge = Gauge(
            "chat_oldest_due_seconds",
            "How long the conversation that was to be removed first had waited when the sweep began.",
        )
        self.counters: dict[str, Counter] = {
            "messages_appended": Counter("chat_messages_appended", "Messages stored."),
            "appends": Counter("chat_appends", "Appends stored, of one message or a batch."),
            "replays": Counter("chat_replays", "Appends that an earlier request had stored."),
            "transaction_retries": Counter("chat_transaction_retries", "Transactions run once more."),
            "sweep_failures": Counter("chat_sweep_failures", "Sweeps in which a step failed."),
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
    """Count a request that was answered, and its time."""
    if _metrics is not None:
        _metrics.requests.labels(method, route, status).inc()
        _metrics.seconds.labels(method, route).observe(seconds)


def command(name: str, seconds: float, *, failed: bool) -> None:
    """Count a round trip to the database, and its time."""
    if _metrics is not None:
        _metrics.database.labels(name).observe(seconds)
        if failed:
            _metrics.database_failures.labels(name).inc()


def set_missing_indexes(number: int) -> None:
    """Note how many indexes are not there yet."""
    if _metrics is not None:
        _metrics.missing_indexes.set(number)


def swept(*, failed: bool) -> None:
    """Count a sweep that failed, or note the time of one that did not."""
    if _metrics is not None:
        if failed:
            _metrics.counters["sweep_failures"].inc()
        else:
            _metrics.last_sweep.set_to_current_time()


def set_oldest_due(seconds: float) -> None:
    """Note how long the conversation that is to be removed first has waited."""
    if _metrics is not None:
        _metrics.oldest_due.set(seconds)


def is_enabled() -> bool:
    """Tell whether anything is counted."""
    return _metrics is not None


def exposition() -> bytes:
    """Return all metrics in the text format of Prometheus."""
    from prometheus_client import generate_latest  # noqa: PLC0415

    return generate_latest()
