"""The one exception for a user's mistake, and what the system refuses as one."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Bad input, told in one line: what is wrong, where, and what to do.

    The commands in `experiments/` print the line and exit with status 2; a traceback is for our
    mistakes, never for the user's.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class UnwrittenError(UserError):
    """A checkpoint was not written; threads of Orbax may wait for minutes for what never comes."""


@contextlib.contextmanager
def telling(what: str, remedy: str = "") -> Iterator[None]:
    """An OSError inside, such as of a full disk, as a UserError: `what`, its reason, `remedy`."""
    try:
        yield
    except OSError as error:
        reason = f"{what}: {error.strerror or error}"
        raise UserError("; ".join(filter(None, (reason, remedy)))) from None
