"""Ends connections that stand still: uvicorn itself waits for ever for a request, and for a reader."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.settings import Settings


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a clock for what a client owes: headers, a body's end, or reading on.

    Nothing is held for such a connection but its socket and what the kernel and the transport buffer (some
    64 KiB): a history that nobody reads is not read from the database either. The settings come with the
    state of the application's lifespan.
    """

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._start(self._settings.header_timeout_ms)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._stop()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Give every further request of the connection its time, too."""
        super().on_message_begin()
        if self._clock is None:
            self._start(self._settings.header_timeout_ms)

    def on_headers_complete(self) -> None:
        """From here on the application waits, for the body, with a time of its own.

        Where there are too many connections the answer is a problem document, which uvicorn's own is not.
        """
        self._stop()
        crowded = len(self.connections) > self._settings.connections_max
        self.app = self.app_state["overloaded"] if crowded else self.config.loaded_app
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Give a body that is not read any more, the answer being sent, a last time to end."""
        unread = self.cycle.more_body
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            self._start(self._settings.header_timeout_ms)

    def on_message_complete(self) -> None:
        """It has ended."""
        self._stop()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._start(self._settings.send_timeout_ms)

    def resume_writing(self) -> None:
        """It has read."""
        self._stop()
        super().resume_writing()

    @property
    def _settings(self) -> Settings:
        settings: Settings = self.app_state["settings"]
        return settings

    def _start(self, milliseconds: int) -> None:
        self._stop()
        self._clock = self.loop.call_later(milliseconds / 1000, self.transport.abort)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
