"""Evaluate a trained run again, on its own held-out text or on another one.

    python -m experiments.evaluate --workdir=runs/quickstart
    python -m experiments.evaluate --workdir=runs/quickstart --config.text.path=OTHER.jsonl
    python -m experiments.evaluate --workdir=runs/quickstart --config=configs/biomedical.py

Settings start from the run's config.json. A config file takes the place of its text and eval
sections; no other setting can be changed. Writes a file into evals/ in the folder of the run, and
eval.json if text, eval settings and checkpoint are the run's own. The name of the file says what is
other: evals/TEXT-DIGEST-step-N-eval-DIGEST.json.
"""

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path
from threading import Event

from absl import flags
from ml_collections import config_flags

from experiments import command_line
from experiments.console import Bars, table
from scale_sae_jax import load
from scale_sae_jax.config import (
    OF_A_TEXT,
    Config,
    TextConfig,
    flatten,
    from_config_dict,
    to_config_dict,
)
from scale_sae_jax.errors import UserError
from scale_sae_jax.run import find_step, measure_run, write_evaluation
from scale_sae_jax.sources import check_sources, open_sources, read_heldout
from scale_sae_jax.workdir import read_config

FLAGS = flags.FLAGS


def define(argv: list[str]) -> None:
    """The settings to override are those of --workdir, so that flag is looked for first."""
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("step", "latest", "Checkpoint: a step, 'latest' or 'best'.")
    workdir = command_line.given(argv, "workdir")
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


def main() -> None:
    workdir = Path(FLAGS.workdir)
    trained, asked = read_config(workdir), from_config_dict(FLAGS.config)
    # An array or synthetic data is its own held-out part: no text is read.
    refuse_unused(trained, asked, ("text", "eval") if trained.lm.path else ("eval",))
    text = text_asked_for(asked.text, trained.text)
    config = dataclasses.replace(trained, eval=asked.eval)
    check_sources(dataclasses.replace(config, text=text))
    step, newest = find_step(workdir, FLAGS.step)
    sae, params = load(workdir, step)
    bars = Bars()
    try:
        sources = open_sources(config, workdir, Event(), bars)
        heldout = read_heldout(config, text, sources, bars)
        measured = sources, heldout, sae, params, step, bars
        results = measure_run(config, text, workdir, *measured)
    finally:
        bars.close()
    print(table(results), flush=True)
    written = write_evaluation(config, text, workdir, results, last=step == newest)
    print(f"  written: {written}")


if __name__ == "__main__":
    command_line.start(main, define)
