"""Harvest, train and evaluate one sparse autoencoder.

    python -m experiments.train --config=configs/quickstart.py:l0=32 --workdir=runs/quickstart

The same command again resumes the run where it stopped. Several processes run it as one program
with --coordinator=HOST:PORT --num_processes=N --process_id=I, or by themselves on SLURM and TPU
pods (docs/scaling.md).
"""

from pathlib import Path

from absl import flags

from experiments import command_line
from experiments.console import Bars, table
from scale_sae_jax.config import from_config_dict
from scale_sae_jax.console import Console
from scale_sae_jax.parallel import processes
from scale_sae_jax.run import run
from scale_sae_jax.training.interrupts import Interrupted, stop_requests

FLAGS = flags.FLAGS


def define(argv: list[str]) -> None:
    command_line.define_config(argv)
    flags.DEFINE_string("workdir", None, "Folder of the run; runs/CONFIG if not given.")


def main() -> None:
    config = from_config_dict(FLAGS.config)
    workdir = Path(FLAGS.workdir or f"runs/{command_line.config_name()}")
    bars = Bars() if processes.leads() else Console()
    try:
        with stop_requests() as stop:
            results = run(config, workdir, stop, bars)
    except Interrupted as stopped:
        bars.close()
        if processes.leads():
            print(f"{stopped}; the same command goes on from there ({workdir})")
        return
    finally:
        bars.close()
    if processes.leads():
        print(f"{table(results)}\n  run: {workdir}")


if __name__ == "__main__":
    command_line.start(main, define, processes_join=True)
