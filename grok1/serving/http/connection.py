"""A connection to a client, with limits on how long it may be unused."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 75


class Connection(H11Protocol):
    """uvicorn's connection, closed if it stays as it is for IDLE_SECONDS to twice as long.

    uvicorn has a limit for the time between two requests, but none for the first, for the head of a
    request, or for a client that does not read its answer.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch."""
        super().connection_made(transport)
        self._watch(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """End watching, so that nothing holds the connection any more."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _watch(self, before: object) -> None:
        now = self._awaited()
        if now is not None and now == before:
            self.transport.abort()
        self._timer = self.loop.call_later(IDLE_SECONDS, self._watch, now)

    def _awaited(self) -> object | None:
        """Return what the client has to do, a request or reading; None: nothing, the server has."""
        if self.cycle is None or self.cycle.response_complete:
            return "request", self.cycle
        unread = self.transport.get_write_buffer_size()
        return ("reading", unread) if unread else None
