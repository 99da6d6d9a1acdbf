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
from pathlib import Path
from threading import Event

from absl import flags

from experiments import command_line
from experiments.console import Bars, table
from experiments.trained import define_run, refuse_unused, text_asked_for
from scale_sae_jax import load
from scale_sae_jax.config import from_config_dict
from scale_sae_jax.errors import UserError
from scale_sae_jax.run import find_step, measure_run, write_evaluation
from scale_sae_jax.sources import check_sources, open_sources, read_heldout
from scale_sae_jax.workdir import read_config

FLAGS = flags.FLAGS


def main() -> None:
    workdir = Path(FLAGS.workdir)
    trained, asked = read_config(workdir), from_config_dict(FLAGS.config)
    # An array or synthetic data is its own held-out part: no text is read.
    refuse_unused(trained, asked, ("text", "eval") if trained.lm.path else ("eval",))
    if asked.text.path and not trained.lm.path:
        raise UserError(
            f"{workdir} was trained without a language model, on activations that are their own "
            f"held-out part, so config.text.path = '{asked.text.path}' would do nothing: leave "
            "--config out, or change config.eval alone"
        )
    text = text_asked_for(asked.text, trained.text) if trained.lm.path else trained.text
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
    command_line.start(main, define_run)
