"""The command `chat-history serve`: runs the service, and the embedded engine if no MongoDB is named."""

from __future__ import annotations

import contextlib
import functools
import importlib
import signal
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, NoReturn

import structlog
import typer

from service.cli.context import fail, read_settings
from service.cli.listening import banner, bound_sockets, say_when_it_listens
from service.embedded.data_directory import EmbeddedEngineError
from service.embedded.engine import EmbeddedEngine
from service.settings import Settings
from service.telemetry import logging

if TYPE_CHECKING:
    import uvicorn

# The exit code with which uvicorn ends, too, if an application does not start.
STARTUP_FAILED = 3


def serve(
    host: Annotated[str | None, typer.Option(help="Listen here. [CHAT_HOST, 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="And on this port. [CHAT_PORT, 8000]")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. [CHAT_WORKERS, 1]")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond this machine without authentication.")
    ] = None,
) -> None:
    """Run the service: on CHAT_MONGODB_URL, or with the embedded engine as its child."""
    settings = read_settings(host=host, port=port, workers=workers, insecure=insecure)
    _refuse_open_service(settings)
    if settings.tracing and not _tracing_is_installed():
        fail("CHAT_TRACING needs the extra `otel`. In a clone of the repository: pip install '.[otel]'.")
    logging.configure(settings)
    _log_what_was_read(settings)
    settings = _with_room_for_connections(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    sockets = bound_sockets(settings)
    with contextlib.ExitStack() as stack:
        if settings.mongodb_url is None:
            try:
                stack.enter_context(EmbeddedEngine(settings, meanwhile=_import_service))
            except EmbeddedEngineError as error:
                fail(str(error))
        say_when_it_listens(sockets[0], functools.partial(banner, settings, sockets[0]))
        _run(settings, sockets)


def _refuse_open_service(settings: Settings) -> None:
    """End unless callers are authenticated, are on this machine, or `--insecure` allows everybody."""
    local = settings.host == "localhost" or settings.host.startswith("127.") or settings.host == "::1"
    if settings.auth == "none" and not local and not settings.insecure:
        fail(
            f"Without authentication (CHAT_AUTH=none), everybody who reaches {settings.host} could read and "
            "change everything. Set CHAT_AUTH=key (and CHAT_API_KEY), or say --insecure."
        )


def _tracing_is_installed() -> bool:
    return all(
        find_spec(name) is not None
        for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.instrumentation")
    )


def _log_what_was_read(settings: Settings) -> None:
    """Log which `.env` was read, and which variables are no settings."""
    log = structlog.get_logger(__name__)
    if settings.env_file_read is not None:
        log.info("env_file_read", file=str(settings.env_file_read))
    if settings.unknown_variables:
        log.warning("unknown_variables", names=settings.unknown_variables)


def _with_room_for_connections(settings: Settings) -> Settings:
    """Allow the process two file descriptors for each connection, or else lower `connections_max`.

    The second descriptor of each connection is for the database, and for clients that are answered that there
    are too many connections. Without a descriptor, the connections of those clients would be reset.
    """
    try:
        import resource
    except ImportError:
        return settings  # Windows has no such limit
    wanted = 2 * settings.connections_max
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses more than a limit of its own
            room = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings
    structlog.get_logger(__name__).warning(
        "connections_max_lowered",
        detail=f"The process may open {soft} descriptors, so CHAT_CONNECTIONS_MAX is {soft // 2} "
        f"and not {settings.connections_max}. Raise the limit (`ulimit -n {wanted}`) or lower the setting.",
    )
    return read_settings(connections_max=soft // 2)


def _end(*_: object) -> NoReturn:
    """End in order on SIGTERM or SIGINT.

    While uvicorn runs, it handles these signals: it answers the running requests, and then raises the signal
    again.
    """
    raise SystemExit(0)


def _import_service() -> None:
    """Import the modules that serving needs, which takes about as long as the engine takes to start."""
    for name in ("service.app", "service.server.http_protocol", "uvicorn.loops.auto"):
        importlib.import_module(name)


def _run(settings: Settings, sockets: list[socket.socket]) -> None:
    """Serve on the sockets until a signal ends it, as `uvicorn.run` does on addresses."""
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    config = _uvicorn_config(settings)
    if settings.workers > 1:
        Multiprocess(config, sockets=sockets).run()
        return
    server = uvicorn.Server(config)
    try:
        server.run(sockets)
    except KeyboardInterrupt:
        pass
    except OSError as error:  # two services that started at once have bound the port, and one listens
        fail(f"The service cannot listen ({error.strerror}). Name another port with CHAT_PORT (or --port).")
    if not server.started:
        raise SystemExit(STARTUP_FAILED)


def _uvicorn_config(settings: Settings) -> uvicorn.Config:
    import uvicorn

    from service.server.http_protocol import TimeoutHttpProtocol

    password = settings.tls_key_password
    return uvicorn.Config(
        "service.app:create_app",
        factory=True,
        workers=settings.workers,
        log_config=None,
        access_log=False,
        proxy_headers=settings.trusted_proxies is not None,
        forwarded_allow_ips=settings.trusted_proxies,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        ssl_keyfile_password=password.get_secret_value() if password else None,
        http=TimeoutHttpProtocol,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=max(1, settings.shutdown_timeout_ms // 1000),
    )
