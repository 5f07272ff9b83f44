"""Traces by OpenTelemetry, where `CHAT_TRACING` asks for them: its own instrumentation, nothing of ours.

A request and each database command are spans. What a command says is not part of its span; the path of a
request, with its ids, is. Where they go, and how they are sampled, `OTEL_*` variables say.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from fastapi import FastAPI


def is_installed() -> bool:
    """Tell whether the extra `otel` is there."""
    return all(
        find_spec(name) is not None
        for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.instrumentation")
    )


def enable(app: FastAPI) -> Callable[[], None]:
    """Trace this application and the driver; return what sends the rest of it and ends."""
    from opentelemetry import trace  # noqa: PLC0415
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor  # noqa: PLC0415
    from opentelemetry.instrumentation.pymongo import PymongoInstrumentor  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    provider = TracerProvider(resource=Resource.create({"service.name": "chat-history"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls="health,metrics")
    PymongoInstrumentor().instrument(tracer_provider=provider, capture_statement=False)
    return provider.shutdown
