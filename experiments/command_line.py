"""What all commands share: one-line errors, and settings from a file and flags."""

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from scale_sae_jax.errors import UserError


def start(main: Callable[[], None], define: Callable[[list[str]], None]) -> None:
    """Defines and parses the flags, runs `main`, and turns a user's mistake into one line.

    Exit status: 0 done, 2 for a user's mistake.
    """

    def parse(argv: list[str]) -> list[str]:
        define(argv)
        rest = flags.FLAGS(argv)
        if rest[1:]:
            raise UserError(f"argument '{rest[1]}' is not understood: flags are written --name=value")
        return rest

    def body(_: list[str]) -> None:
        # absl prints INFO of every library to stderr once flags are parsed.
        logging.set_verbosity(logging.WARNING)
        try:
            main()
        except UserError as error:
            fail(str(error))

    try:
        app.run(body, flags_parser=parse)
    except UserError as error:
        fail(str(error))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, flags.Error) or _while_parsing(error):
            fail(" ".join(str(error).split()))
        raise


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def define_config() -> None:
    """--config=FILE.py[:key=value,...], with --config.NAME=VALUE for single settings."""
    config_flags.DEFINE_config_file("config", None, "Config file, with arguments after a colon.")
    flags.mark_flag_as_required("config")


def config_name() -> str:
    """The stem of the config file: configs/owt.py:l0=32 is 'owt'."""
    return Path(flags.FLAGS["config"].config_filename).stem


def _while_parsing(error: Exception) -> bool:
    """Whether ml_collections raised it while it applied --config flags."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_name == "parse":
            return True
        frame = frame.tb_next
    return False
