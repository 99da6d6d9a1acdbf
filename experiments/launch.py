"""Run one program in many processes: here, as a SLURM job, or on a TPU slice.

    python -m experiments.launch --on=local --processes=2 --go \
        --command='experiments.train --config=configs/owt.py:l0=32 --workdir=runs/owt'
    python -m experiments.launch --on=slurm --nodes=4 --gpus_per_node=8 --command='...' > job.sbatch
    python -m experiments.launch --on=tpu --name=sae --zone=us-west4-a --type=v5litepod-256 \
        --command='experiments.sweep --grid=configs/grids/architectures.py --workdir=/mnt/runs/arch'

Prints what it would run; --go runs it. The command is experiments.train for one run or
experiments.sweep for a grid, and its --workdir a folder that all processes share. Where a job is
cut short, the same job again resumes (docs/scaling.md).
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

from absl import flags

from experiments import command_line
from scale_sae_jax.errors import UserError, telling

FLAGS = flags.FLAGS
PROGRAMS = ("experiments.train", "experiments.sweep")
Command = list[str]


def define(argv: list[str]) -> None:
    del argv
    flags.DEFINE_enum("on", None, ["local", "slurm", "tpu"], "Where.")
    flags.DEFINE_string("command", None, "Program and flags, without 'python -m'.")
    flags.DEFINE_bool("go", False, "Run it instead of printing it.")
    flags.DEFINE_integer("processes", 2, "local: how many.", lower_bound=1)
    flags.DEFINE_integer("cpu_devices", 0, "local: CPU devices a process; 0 leaves it to JAX.",
                         lower_bound=0)
    flags.DEFINE_integer("nodes", 1, "slurm: machines.", lower_bound=1)
    flags.DEFINE_integer("gpus_per_node", 8, "slurm: GPUs, and processes, a machine.",
                         lower_bound=1)
    flags.DEFINE_string("time", "24:00:00", "slurm: longest time.")
    flags.DEFINE_string("partition", "", "slurm: partition.")
    flags.DEFINE_string("name", "scale-sae", "slurm, tpu: name of the job or slice.")
    flags.DEFINE_string("zone", "", "tpu: zone.")
    flags.DEFINE_string("type", "v5litepod-8", "tpu: accelerator type of the slice.")
    flags.DEFINE_string("version", "v2-alpha-tpuv5-lite", "tpu: its software.")
    flags.DEFINE_string("folder", "scale_sae_jax", "tpu: the checkout on its machines.")
    flags.DEFINE_bool("spot", False, "tpu: a slice that may be taken away.")
    flags.mark_flags_as_required(["on", "command"])


def program(text: str) -> Command:
    """The words after 'python -m'. Raises UserError for what is no program of these."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--command: {error}; quote it once as a whole") from None
    if not words or words[0] not in PROGRAMS:
        raise UserError(f"--command must begin with one of {', '.join(PROGRAMS)}")
    if not any(word.partition("=")[0] == "--workdir" for word in words):
        raise UserError("--command has no --workdir=DIR: name a folder that all processes share")
    return words


def local(words: Command, processes: int, port: int) -> list[Command]:
    """A command for each process on this machine."""
    together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [
        [sys.executable, "-m", *words, *together, f"--process_id={number}"]
        for number in range(processes)
    ]


def slurm(words: Command) -> str:
    """The text of an sbatch file: a process for each GPU, which find each other by themselves."""
    partition = [f"#SBATCH --partition={FLAGS.partition}"] if FLAGS.partition else []
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={FLAGS.name}",
        f"#SBATCH --nodes={FLAGS.nodes}",
        f"#SBATCH --ntasks-per-node={FLAGS.gpus_per_node}",
        f"#SBATCH --gpus-per-node={FLAGS.gpus_per_node}",
        f"#SBATCH --time={FLAGS.time}",
        *partition,
        "# Two minutes before its end the run saves and stops; submitted again, it goes on.",
        "#SBATCH --signal=TERM@120",
        "#SBATCH --requeue",
        f"srun --kill-on-bad-exit=1 {shlex.join(['python', '-m', *words])}",
    ]
    return "\n".join(lines) + "\n"


def tpu(words: Command) -> list[Command]:
    """gcloud commands: make the slice, and start the program on all of its machines."""
    if not FLAGS.zone:
        raise UserError("--zone is missing: name the zone of the slice, such as us-west4-a")
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    where = [FLAGS.name, f"--zone={FLAGS.zone}"]
    remote = f"cd {shlex.quote(FLAGS.folder)} && {shlex.join(['python3', '-m', *words])}"
    return [
        [*gcloud, "create", *where, f"--accelerator-type={FLAGS.type}",
         f"--version={FLAGS.version}", *["--spot"] * FLAGS.spot],
        [*gcloud, "ssh", *where, "--worker=all", f"--command={remote}"],
    ]


def run_together(commands: list[Command], cpu_devices: int) -> int:
    """Runs all at once; the first exit status that is not 0, or 0. Hands SIGTERM on to all."""
    env = dict(os.environ)
    if cpu_devices:
        env |= {"JAX_NUM_CPU_DEVICES": str(cpu_devices), "JAX_PLATFORMS": "cpu"}
    running = []
    before = signal.signal(signal.SIGTERM, lambda *_: [p.terminate() for p in running])
    for command in commands:
        running.append(subprocess.Popen(command, env=env))
    while any(process.poll() is None for process in running):
        with contextlib.suppress(KeyboardInterrupt):  # each of them got it too, and saves
            for process in running:
                process.wait()
    signal.signal(signal.SIGTERM, before)
    return next(filter(None, (process.returncode for process in running)), 0)


def _start(command: Command, **options) -> int:
    try:
        return subprocess.run(command, **options).returncode
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed here: leave out --go, and run what is "
                        "printed where it is") from None


def main() -> None:
    words = program(FLAGS.command)
    if FLAGS.on == "slurm":
        text = slurm(words)
        if not FLAGS.go:
            print(text, end="")
            return
        path = Path(f"{FLAGS.name}.sbatch")
        with telling(f"cannot write {path}", "choose another --name, or a folder to write in"):
            path.write_text(text)
        sys.exit(_start(["sbatch", str(path)]))
    if FLAGS.on == "tpu":
        for command in tpu(words):
            if not FLAGS.go:
                print(shlex.join(command))
            elif code := _start(command):
                sys.exit(code)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = local(words, FLAGS.processes, port)
    if FLAGS.go:
        sys.exit(run_together(commands, FLAGS.cpu_devices))
    for command in commands:
        print(shlex.join(["python", *command[1:]]))


if __name__ == "__main__":
    command_line.start(main, define)
