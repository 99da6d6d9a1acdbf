"""Notices at once that another process of the program is gone or failed, and ends this one.

Each process holds a connection to the leading one, over which it says one line: a farewell, or what
went wrong. The system closes the connections of a process that dies; whoever sees one close without
a word ends itself, the leading process too, so that all the others follow. A process that hangs
without dying is noticed by the heartbeat of `jax.distributed` instead.

A mistake of the user's is mostly found by all processes. One that fails alone (its documents are
empty, its disk is full) leaves the others waiting in an exchange: they end if they have not
failed too within a few seconds, and the leading process tells why.

A connection begins with a random token, which only these processes know; any other is dropped.
"""

import contextlib
import hmac
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from threading import Event, Thread

FAREWELL, FAILURE, VERDICT = b".", b"!", b"="  # first byte of a line; a verdict ends who hears it
FAILED, LOST = 2, 3  # exit statuses
ALONE_SECONDS = 3  # after which a failure is that of one process
LINE_BYTES = 4096
TOKEN_BYTES, TOKEN_SECONDS = 16, 5
PORT_BITS = 16


class Watch:
    """Connections to other processes, each read by a thread of its own."""

    def __init__(self, number: int, end: Callable[[int], None] = os._exit):
        self._number, self._end = number, end
        self._connections, self._readers, self._heard = [], [], []
        self._accepting = Thread()
        self._leaving = Event()

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

        self._accepting = Thread(target=accept, daemon=True)
        self._accepting.start()
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
        self._say(FAREWELL)
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
            connection.close()

    def fail(self, message: str) -> bool:
        """Says what went wrong here. Returns once the others have failed too, or left.

        Otherwise it ends this process, and the message ends the others. Returns whether it is for
        this process to tell the user.
        """
        self._leaving.set()
        until = time.monotonic() + ALONE_SECONDS + 2
        if self._accepting.is_alive():  # others are still to come, and would hear nothing
            self._accepting.join(ALONE_SECONDS)
        self._say(FAILURE, message)
        for reader in self._readers:
            reader.join(max(0.0, until - time.monotonic()))
        speaks = self._number == 0 or not self._connections
        words = [word for word in self._heard if word in (FAREWELL, FAILURE)]
        if len(words) < len(self._connections):
            self._stop(message if speaks else "", FAILED)
        return speaks

    def _say(self, word: bytes, message: str = "") -> None:
        line = word + " ".join(message.split()).encode()[: LINE_BYTES - 2] + b"\n"
        for connection in self._connections:
            with contextlib.suppress(OSError):  # the other has left before
                connection.sendall(line)

    def _read(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections.append(connection)

        def read() -> None:
            try:
                with connection.makefile("rb") as lines:
                    line = lines.readline(LINE_BYTES)
            except OSError:
                line = b""
            word, message = line[:1], line[1:].decode(errors="replace").strip()
            self._heard.append(word)
            if word == VERDICT:
                self._stop("", FAILED)
            elif word == FAILURE:
                if self._leaving.wait(ALONE_SECONDS):
                    return
                if self._number == 0:
                    self._say(VERDICT)
                self._stop(message if self._number == 0 else "", FAILED)
            elif word != FAREWELL and not self._leaving.is_set():
                self.lost()

        self._readers.append(Thread(target=read, daemon=True))
        self._readers[-1].start()

    def lost(self, details: str = "") -> None:
        """Ends this process at once: a regular exit would wait for the lost one."""
        self._stop(
            f"process {self._number} stops, for another process was lost{details}; start "
            "all of them again: they resume from the last checkpoint", LOST,
        )

    def _stop(self, message: str, status: int) -> None:
        if message:
            print(f"\nerror: {message}", file=sys.stderr, flush=True)
        self._end(status)


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
