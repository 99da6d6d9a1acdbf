"""SIGTERM and Ctrl-C as a request to stop at the next safe point."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupted(Exception):
    """Work stopped on request before it was complete; what was written stays valid."""


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a second one acts as it did before.

    Outside the main thread signals cannot be handled, and the event never gets set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {}

    def request(number, frame):
        del frame
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
