"""What all commands share: one-line errors, and settings from a file and flags."""

import os
import re
import sys
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from types import ModuleType

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from scale_sae_jax.config import Config, to_config_dict
from scale_sae_jax.errors import UnwrittenError, UserError
from scale_sae_jax.parallel import processes

FLAGS = flags.FLAGS


def start(
    main: Callable[[], None], define: Callable[[list[str]], None], processes_join: bool = False
) -> None:
    """Defines and parses the flags, runs `main`, and turns a user's mistake into one line.

    Args:
      processes_join: whether several processes may run the command as one program; it then takes
        --coordinator, --num_processes and --process_id.

    Exit status: 0 done, 2 for a user's mistake, 3 if another process of the program was lost, 130
    after Ctrl-C, where a command has not its own way to stop.
    """

    def parse(argv: list[str]) -> list[str]:
        logging.set_verbosity(logging.ERROR)  # what absl warns of here, the one line says too
        argv = [re.sub(r"^(--[\w.]+=)(~/.*)", _at_home, word) for word in argv]
        try:
            _refuse_unknown_settings(argv)
            before = set(FLAGS)
            define(argv)
            if processes_join:
                _define_processes()
            _list_in_help(set(FLAGS) - before)
            rest = FLAGS(argv)
        except UserError:
            raise
        except flags.Error as error:
            raise UserError(_in_one_line(error, argv)) from None
        except Exception as error:  # whatever a config file of the user's may raise
            if isinstance(error, AttributeError) and error.name == "get_config":
                raise UserError(
                    f"--config={given(argv, 'config')}: the file defines no get_config(): see "
                    "configs/quickstart.py"
                ) from error
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
            if processes_join:
                _join_and_run(main)
            else:
                main()
        except UnwrittenError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(2)  # a regular end would wait for the threads that write
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt:
            print("\nstopped by Ctrl-C", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(130)  # threads that compute do not stop

    try:
        app.run(body, flags_parser=parse)
    except UserError as error:
        fail(str(error))


def _at_home(given: re.Match) -> str:
    """A value that starts with ~/, which shells leave as it is behind a = sign."""
    return given[1] + os.path.expanduser(given[2])


def _list_in_help(names: set[str]) -> None:
    """Of the flags of a command, absl's --help lists those that its own file defines."""
    for name in sorted(names):
        if "." not in name:  # of the settings, --config alone
            FLAGS.register_key_flag_for_module(sys.argv[0], FLAGS[name])


def _in_one_line(error: flags.Error, argv: list[str]) -> str:
    text = str(error)
    missing = re.findall(r"Flag (--\w+) must have a value other than None", text)
    config = given(argv, "config")
    if config and "--config" in missing:
        return f"--config={config}: its get_config() returns nothing: let it return the settings"
    if config and "Traceback" in text:  # of the config file; the last line says what went wrong
        where = [n for file, n in re.findall(r'File "(.+)", line (\d+)', text)
                 if Path(file).name == Path(config.partition(":")[0]).name]
        place = f", line {where[-1]}" if where else ""
        return f"--config={config}{place}: {text.strip().splitlines()[-1]}"
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return f"{' and '.join(missing)} {verb} missing: --help lists the flags"
    return "; ".join(text.splitlines())


def _define_processes() -> None:
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0; found by itself on SLURM, TPU.")
    flags.DEFINE_integer("num_processes", 0, "Processes of this program.")
    flags.DEFINE_integer("process_id", -1, "Number of this one, from 0.")


def _join_and_run(main: Callable[[], None]) -> None:
    """`main`, with the other processes if there are any; without one of them none can go on."""
    watch = processes.join(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    if watch is None:
        main()
        return
    try:
        main()
    except UserError as error:
        if watch.fail(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # a regular end would wait for processes that have ended
    except SystemExit:
        watch.leave()
        raise
    except Exception as error:
        if not processes.lost(error):
            raise
        watch.lost(f" or a device failed ({str(error).strip().splitlines()[0][:200]})")
    watch.leave()


def define_where() -> None:
    flags.DEFINE_list("where", [], "Keep the rows with these values, AXIS=VALUE,AXIS=VALUE.")


def import_matplotlib() -> ModuleType:
    """The module. Raises UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install '.[plot]'") from None
    return matplotlib


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
        raise UserError(f"--config={name}: there is no such file; name one of configs/*.py, "
                        "run from the checkout, or give its full path")
    if name is not None and holds_only(name, "get_grid", "get_config"):
        raise UserError(f"--config={name}: this is a grid: use experiments.sweep --grid={name}")
    config_flags.DEFINE_config_file("config", None, "Config file, with arguments after a colon.")
    flags.mark_flag_as_required("config")


def holds_only(name: str, this: str, other: str) -> bool:
    """Whether 'FILE.py[:ARG]' defines a function called `this`, and none called `other`."""
    path = Path(name.split(":")[0])
    text = path.read_text(errors="replace") if path.is_file() else ""
    found = re.findall(r"^def (\w+)\(", text, re.MULTILINE)
    return this in found and other not in found


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
