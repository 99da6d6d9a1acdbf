"""How a run speaks to the person who started it; `experiments/console.py` shows it."""

from typing import Any


class Console:
    """What a run tells the person who started it. This one says nothing."""

    def note(self, text: str) -> None:
        """A remark in one line."""

    def progress(self, what: str, done: int, total: int) -> None:
        """How far `what` has come."""

    def step(self, record: dict[str, Any], total: int) -> None:
        """A training record."""

    def close(self) -> None:
        """Nothing more comes for now."""
