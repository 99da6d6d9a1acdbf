"""Commands on a trained run: their flags, and which of its settings they may change."""

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import command_line
from scale_sae_jax.config import OF_A_TEXT, Config, TextConfig, flatten, to_config_dict
from scale_sae_jax.errors import UserError
from scale_sae_jax.workdir import read_config

FLAGS = flags.FLAGS


def define_run(argv: list[str]) -> None:
    """The settings to override are those of --workdir, so that flag is looked for first."""
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("step", "latest", "Checkpoint: a step, 'latest' or 'best'.")
    workdir = command_line.given(argv, "workdir")
    if workdir is None and any(word.startswith("--config.") for word in argv):
        raise UserError("--workdir is missing: the settings to change are those of that run")
    if command_line.given(argv, "config") is not None:
        command_line.define_config(argv)
    elif workdir is not None:
        settings = to_config_dict(read_config(Path(workdir)))
        config_flags.DEFINE_config_dict("config", settings)
    flags.mark_flag_as_required("workdir")


def refuse_unused(trained: Config, asked: Config, used: Collection[str]) -> None:
    """Refuses a flag --config.NAME that would change a setting which the command does not read.

    Args:
      used: sections and settings that it reads from `asked`, such as 'text' and 'eval.tokens'; all
        else comes from `trained`. What a config file says of that may differ, flags may not.

    Raises UserError.
    """
    old, new = (flatten(dataclasses.asdict(config)) for config in (trained, asked))
    flags_given = config_flags.get_override_values(FLAGS["config"])
    for name in (name for name in new if old[name] != new[name]):
        if _lies_in(name, flags_given) and not _lies_in(name, used):
            may = " and ".join(f"config.{part}" for part in used)
            here = f"only {may} may change here" if used else "no setting may change here"
            raise UserError(
                f"--config.{name}={new[name]} would do nothing, the run has {old[name]!r} and "
                f"{here}: leave it out"
            )


def _lies_in(name: str, places: Iterable[str]) -> bool:
    """Whether a dotted name is one of `places` or inside one."""
    return any(f"{name}.".startswith(f"{place}.") for place in places)


def text_asked_for(asked: TextConfig, trained: TextConfig) -> TextConfig:
    """With another path, what only fits the path trained on is left behind."""
    if asked.path == trained.path:
        return asked
    default = TextConfig()
    left = {n: getattr(default, n) for n in OF_A_TEXT if getattr(asked, n) == getattr(trained, n)}
    return dataclasses.replace(asked, **left)
