"""Notices at once that another process of the program is gone, and ends this one.

Each process holds a connection to the leading one, over which nothing is said but a farewell. The
system closes the connections of a process that dies; whoever sees one close without farewell ends
itself, the leading process too, so that all the others follow. A process that hangs without
dying is noticed by the heartbeat of `jax.distributed` instead.

A connection begins with a random token, which only these processes know; any other is dropped.
"""

import contextlib
import hmac
import os
import secrets
import socket
import sys
from collections.abc import Callable
from threading import Event, Thread

FAREWELL = b"."
EXIT_STATUS = 3
TOKEN_BYTES, TOKEN_SECONDS = 16, 5
PORT_BITS = 16


class Watch:
    """Connections to other processes, each read by a thread of its own."""

    def __init__(self, number: int, end: Callable[[int], None] = os._exit):
        self._number, self._end = number, end
        self._connections, self._leaving = [], Event()

    def expect(self, others: int) -> int:
        """In the leading process: takes a connection from each of the others.

        Returns what they `connect` by, to be told to nobody else: one number, the port in its low
        bits and the token above it.
        """
        server = socket.create_server(("", 0), backlog=others + 8)
        token = secrets.token_bytes(TOKEN_BYTES)

        def accept() -> None:
            missing = others
            while missing:
                connection = server.accept()[0]
                if _says(connection, token):
                    self._read(connection)
                    missing -= 1
                else:
                    connection.close()
            server.close()

        Thread(target=accept, daemon=True).start()
        return int.from_bytes(token) << PORT_BITS | server.getsockname()[1]

    def connect(self, host: str, number: int) -> None:
        """In another process, by the number from `expect`. Raises OSError if it fails."""
        token, port = divmod(number, 1 << PORT_BITS)
        connection = socket.create_connection((host, port), timeout=30)
        connection.sendall(token.to_bytes(TOKEN_BYTES))
        self._read(connection)

    def leave(self) -> None:
        """Says farewell: this process ends as it should."""
        self._leaving.set()
        for connection in self._connections:
            with contextlib.suppress(OSError):  # the other has left before
                connection.sendall(FAREWELL)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
            connection.close()

    def _read(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections.append(connection)

        def read() -> None:
            try:
                last = connection.recv(1)
            except OSError:
                last = b""
            if last != FAREWELL and not self._leaving.is_set():
                self.lost()

        Thread(target=read, daemon=True).start()

    def lost(self, details: str = "") -> None:
        """Ends this process at once: a regular exit would wait for the lost one."""
        print(
            f"\nerror: process {self._number} stops, for another process was lost{details}; start "
            "all of them again: they resume from the last checkpoint",
            file=sys.stderr, flush=True,
        )
        self._end(EXIT_STATUS)


def _says(connection: socket.socket, token: bytes) -> bool:
    """Whether the other end sends the token, and soon."""
    connection.settimeout(TOKEN_SECONDS)
    said = b""
    try:
        while len(said) < len(token) and (more := connection.recv(len(token) - len(said))):
            said += more
    except OSError:
        return False
    return hmac.compare_digest(said, token)
