"""What all commands share: one-line errors, and settings from a file and flags."""

import sys
from collections.abc import Callable
from logging import getLogger
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from scale_sae_jax.config import Config, to_config_dict
from scale_sae_jax.errors import UserError


def start(main: Callable[[], None], define: Callable[[list[str]], None]) -> None:
    """Defines and parses the flags, runs `main`, and turns a user's mistake into one line.

    Exit status: 0 done, 2 for a user's mistake.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            _refuse_unknown_settings(argv)
            define(argv)
            rest = flags.FLAGS(argv)
        except (UserError, flags.Error) as error:
            raise UserError(str(error)) from None
        except Exception as error:  # whatever a config file of the user's may raise
            raise UserError(f"{type(error).__name__} in --config: {error}") from error
        if rest[1:]:
            raise UserError(f"argument '{rest[1]}' is not understood: write flags as --name=value")
        return rest

    def body(_: list[str]) -> None:
        # absl prints INFO of every library to stderr once flags are parsed.
        logging.set_verbosity(logging.WARNING)
        # Of a damaged checkpoint, asyncio reports every read that fails beside the first.
        getLogger("asyncio").setLevel("CRITICAL")
        try:
            main()
        except UserError as error:
            fail(str(error))

    try:
        app.run(body, flags_parser=parse)
    except UserError as error:
        fail(str(error))


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def given(argv: list[str], name: str) -> str | None:
    """The value of --name before flags are defined; None if it is not there."""
    early = flags.FlagValues()
    early.set_gnu_getopt()
    flags.DEFINE_string(name, None, "", flag_values=early)
    early(argv, known_only=True)
    return early[name].value


def define_config(argv: list[str]) -> None:
    """--config=FILE.py[:key=value,...], with --config.NAME=VALUE for single settings."""
    name = given(argv, "config")
    if name is not None and not Path(name.split(":")[0]).is_file():
        raise UserError(f"--config={name}: there is no such file; name one of configs/*.py")
    config_flags.DEFINE_config_file("config", None, "Config file, with arguments after a colon.")
    flags.mark_flag_as_required("config")


def config_name() -> str:
    """The stem of the config file: configs/owt.py:l0=32 is 'owt'."""
    return Path(flags.FLAGS["config"].config_filename).stem


def _refuse_unknown_settings(argv: list[str]) -> None:
    """Of an unknown --config.NAME, ml_collections tells no more than the last part."""
    for name in (arg.lstrip("-").split("=")[0] for arg in argv[1:]):
        if not name.startswith("config."):
            continue
        where, setting = "config", to_config_dict(Config())
        for part in name.split(".")[1:]:
            if not isinstance(setting, ConfigDict):
                raise UserError(f"--{name} is unknown: {where} is a single setting")
            if part not in setting:
                raise UserError(f"--{name} is unknown: {where} takes {', '.join(setting)}")
            where, setting = f"{where}.{part}", setting[part]
