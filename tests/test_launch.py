"""What is planned and launched, and connections that notice a lost process."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from scale_sae_jax.config import OptimConfig, SAEConfig
from scale_sae_jax.parallel import watch
from scale_sae_jax.parallel.plan import plan
from scale_sae_jax.parallel.watch import Watch

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


def call(module, *args):
    """(exit status, stdout, stderr) of a command."""
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=ENVIRONMENT
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


TRAIN = "experiments.train --config=configs/owt.py:l0=32 --workdir='runs/a b'"


def test_local_commands_are_one_program():
    _, out, _ = call("experiments.launch", "--on=local", "--processes=3", f"--command={TRAIN}")
    lines = [shlex.split(line) for line in out.splitlines()]
    assert [line[-1] for line in lines] == [f"--process_id={i}" for i in range(3)]
    assert len({line[-3] for line in lines}) == 1 and lines[0][-3].startswith("--coordinator=")
    assert all(line[:3] == ["python", "-m", "experiments.train"] for line in lines)
    assert all("--workdir=runs/a b" in line for line in lines)


def test_slurm_and_tpu_commands():
    _, out, _ = call(
        "experiments.launch", "--on=slurm", "--nodes=4", "--gpus_per_node=2", "--partition=gpu",
        f"--command={TRAIN}",
    )
    assert out.startswith("#!/bin/bash\n") and "--ntasks-per-node=2\n" in out
    assert "#SBATCH --nodes=4\n" in out and "#SBATCH --partition=gpu\n" in out
    srun = shlex.split(out.splitlines()[-1])
    assert srun[0] == "srun" and srun[-1] == "--workdir=runs/a b"
    _, out, _ = call(
        "experiments.launch", "--on=tpu", "--zone=z", "--type=v5litepod-256", "--spot",
        f"--command={TRAIN}",
    )
    create, ssh = map(shlex.split, out.splitlines())
    assert "--accelerator-type=v5litepod-256" in create and "--spot" in create
    inner = shlex.split(ssh[-1].removeprefix("--command="))
    assert "--worker=all" in ssh and inner[-1] == "--workdir=runs/a b"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--on=local", "--command=rm -rf x"], "must begin with one of experiments.train"),
        (["--on=local", "--command=experiments.train"], "has no --workdir"),
        (["--on=local", "--command='"], "quote"),
        (["--on=tpu", f"--command={TRAIN}"], "--zone is missing"),
        (["--on=slurm", "--gpus_per_node=0", f"--command={TRAIN}"], "--gpus_per_node=0"),
        (["--on=local", "--cpu_devices=-1", f"--command={TRAIN}"], "--cpu_devices=-1"),
        ([], "--on and --command are missing"),
        (
            ["--on=slurm", "--go", "--name=no/such/job", f"--command={TRAIN}"],
            "cannot write no/such/job.sbatch",
        ),
    ],
)
def test_what_cannot_be_launched_is_told_in_a_line(flags, message):
    code, _, err = call("experiments.launch", *flags)
    assert code == 2 and message in err


OWT = "--config=configs/owt.py:l0=32"


def test_plan_of_a_mesh_and_what_to_change():
    code, out, _ = call("experiments.plan", OWT, "--d=768", "--mesh=data:4,expert:2")
    assert code == 0 and "8 devices, 32 of 64 experts and 1,024 of 8,192" in out and "fits" in out
    code, out, _ = call("experiments.plan", OWT, "--d=768", "--devices=1", "--memory_gb=0.9")
    assert code == 1 and "does not fit" in out
    assert "fits with --config.mesh=data:1,expert:4" in out
    for flags, message in (
        (["--d=768"], "add --devices=N"),
        (["--d=-5", "--devices=1"], "--d=-5"),
        (["--d=768", "--devices=-1"], "--devices=-1"),
        (["--d=768", "--mesh=expert:3"], "take expert:1"),
        (["--d=768", "--mesh=data:3"], "cannot be split over 3 devices: take 8193"),
    ):
        code, _, err = call("experiments.plan", OWT, *flags)
        assert code == 2 and message in err


def test_plan_needs_the_width_alone(tmp_path):
    path = tmp_path / "acts.npy"
    np.save(path, np.zeros((4, 48), np.float16))
    array = f"--config=configs/array.py:path={path},experts=4,latents=64,l0=4"
    outs = [call("experiments.plan", array, *d, "--devices=1")[:2] for d in ([], ["--d=48"])]
    assert outs[0] == outs[1] and outs[0][0] == 0
    code, _, err = call("experiments.plan", OWT, "--config.lm.path=./absent", "--devices=1")
    assert code == 2 and "./absent" in err and "--d=768" in err


def test_plan_of_the_state_by_hand():
    """N m d numbers each of encoder and decoder, twice again as moments, over `expert`."""
    config = SAEConfig(latents=24_576, experts=64, active=2, k=32, auxk=False)
    whole = plan(config, OptimConfig(), 768, 4096, 1, {"data": 1, "expert": 1})
    assert whole.received == 0 and whole.flops == 4096 * (10 * 768 * 768 + 6 * 768 * 64)
    split = plan(config, OptimConfig(), 768, 4096, 1, {"data": 2, "expert": 4})
    shared = 768 * 64 + 64 + 2 * 768
    experts = 2 * 24_576 * 768 + 24_576 + 64
    assert whole.memory["parameters"] == 4 * (experts + shared)
    assert split.memory["parameters"] == 4 * (experts // 4 + shared)
    assert split.memory["moments"] == 2 * split.memory["parameters"]
    assert split.memory["batches"] == 4 * 4096 * 768 // 8
    assert split.traffic["tokens to experts"] == 4 * 2048 * 3 / 4 * (768 + 3 * 2)
    narrow = OptimConfig(moment_dtype="bfloat16")
    assert plan(config, narrow, 768, 4096, 1, {"data": 2, "expert": 4}).memory["moments"] < (
        0.52 * split.memory["moments"]
    )


@pytest.mark.parametrize("flags", (["--mesh=data:2,expert:4"], ["--mesh=expert:8", "--auxk"]))
def test_plan_and_state_against_the_compiled_step(flags):
    _, out, _ = call(
        "benchmarks.scaling", "--d=256", "--latents=16384", "--experts=32", "--batch=2048", *flags
    )
    (line,) = map(json.loads, out.splitlines())
    used = line["argument_gb"] + line["temporary_gb"]
    assert abs(line["planned_gb"] / used - 1) < 0.15, line
    experts = 3 * 4 * (2 * 16_384 * 256 + 16_384 + 32)  # parameters and two moments
    shards = 4 if "data" in flags[0] else 8
    assert line["expert_state_gb"] * 1e9 == experts / shards
    if "--auxk" not in flags:
        assert abs(line["planned_received_gb"] / line["received_gb"] - 1) < 0.15, line


@pytest.mark.parametrize("preset", ("topk", "gated"))
def test_one_dictionary_receives_what_is_planned(preset):
    _, out, _ = call("benchmarks.scaling", f"--preset={preset}", "--d=64", "--latents=1024",
                     "--experts=1", "--active=1", "--k=8", "--batch=256", "--mesh=data:8")
    (line,) = map(json.loads, out.splitlines())
    assert line["received_gb"] > 0
    assert abs(line["planned_received_gb"] / line["received_gb"] - 1) < 0.01, line


def connected(ends, count=2):
    """The watches of processes that write (number, status) into `ends` instead of ending."""
    watches = [Watch(i, lambda code, i=i: ends.append((i, code))) for i in range(count)]
    number = watches[0].expect(count - 1)
    for other in watches[1:]:
        other.connect("127.0.0.1", number)
    until = time.monotonic() + 20
    while len(watches[0]._connections) < count - 1 and time.monotonic() < until:
        time.sleep(0.01)
    return watches


def wait_for(ends, count):
    until = time.monotonic() + 20
    while len(set(ends)) < count and time.monotonic() < until:
        Event().wait(0.01)


def test_a_connection_that_closes_without_farewell_ends_the_other_process(capfd):
    ends = []
    lead, other = connected(ends)
    other._connections[0].shutdown(2)  # what the system does for a process that dies
    wait_for(ends, 2)
    assert sorted(ends) == [(0, 3), (1, 3)]
    assert "process 0 stops, for another process was lost" in capfd.readouterr().err
    lead.leave()
    other.leave()


def test_strangers_are_dropped_and_end_nobody(monkeypatch):
    monkeypatch.setattr(watch, "TOKEN_SECONDS", 0.2)
    ends = []
    lead = Watch(0, ends.append)
    number = lead.expect(1)
    port, strangers = number % 2**16, []
    for said in (b"", b"." * 16, b"GET / HTTP/1.1\r\n\r\n", None):
        stranger = socket.create_connection(("127.0.0.1", port))
        strangers.append(stranger)
        if said is not None:  # the last one says nothing, and stays
            stranger.sendall(said)
            with contextlib.suppress(OSError):  # turned away already
                stranger.shutdown(socket.SHUT_WR)
    other = Watch(1, ends.append)
    other.connect("127.0.0.1", number)
    until = time.monotonic() + 20
    while not lead._connections and time.monotonic() < until:
        time.sleep(0.01)
    assert len(lead._connections) == 1 and ends == []
    for watcher in (other, lead):
        watcher.leave()
    for stranger in strangers:
        stranger.close()


def test_a_farewell_ends_nobody():
    ends = []
    lead, other = connected(ends)
    other.leave()
    lead.leave()
    Event().wait(0.3)
    assert ends == []


def test_a_mistake_that_all_find_ends_nobody_and_the_lead_tells_it():
    ends = []
    watches = connected(ends, 3)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda w: w.fail("no such\nfile"), watches)) == [True, False, False]
    assert ends == []
    for watcher in watches:
        watcher.leave()


@pytest.mark.parametrize("alone", [0, 2])
def test_a_process_that_fails_alone_ends_the_others_and_the_lead_tells_why(
    alone, monkeypatch, capfd
):
    monkeypatch.setattr(watch, "ALONE_SECONDS", 0.2)
    ends = []
    watches = connected(ends, 3)
    watches[alone].fail("no activation is left")
    wait_for(ends, 3)
    assert set(ends) == {(0, 2), (1, 2), (2, 2)}
    assert "error: no activation is left\n" in capfd.readouterr().err
    for watcher in watches:
        watcher.leave()


def test_sigterm_to_the_launcher_goes_to_all():
    code = """
import sys
from experiments.launch import run_together
wait = "import time; print('begun;', end='', flush=True); time.sleep(60)"
sys.exit(-run_together([[sys.executable, "-c", wait]] * 2, 0))
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout.read(12) == "begun;begun;"
        launcher.terminate()
        assert launcher.wait(timeout=30) == signal.SIGTERM  # of the first of them


def test_libtpu_on_another_machine_makes_no_cluster(tmp_path):
    (tmp_path / "libtpu.py").write_text("")
    code = "from scale_sae_jax.parallel.processes import join; assert join() is None"
    env = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
