"""Real processes on one machine: they train together, die together, and resume."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sums import sums_of_three
from test_harvest import ACTIVATIONS, LM, begin_parts, files, model, text_config

import scale_sae_jax
from scale_sae_jax.activations import store
from scale_sae_jax.activations.harvest import harvest
from scale_sae_jax.activations.synthetic import open_synthetic
from scale_sae_jax.config import SyntheticConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation.ground_truth import measure_ground_truth
from scale_sae_jax.parallel import processes
from scale_sae_jax.text.splits import document_hash, training_documents
from scale_sae_jax.training.metrics import read_lines

ROOT = Path(__file__).parent.parent
STEPS = 60
SIZES = "experts=8,latents=64,l0=4"
SETTINGS = ("batch_size=64", "log_every=10", "checkpoint_every=20", "optim.lr=1e-3",
            "eval.tokens=512", "eval.bootstrap=20", "text.heldout_fraction=0.25")


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    """Sums of three of 24 directions."""
    path = tmp_path_factory.mktemp("array") / "x.npy"
    np.save(path, sums_of_three(4096))
    return path


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(array, workdir, count, devices, steps=STEPS):
    """The processes of one run on an array."""
    settings = *SETTINGS, f"steps={steps}"
    return start(f"configs/array.py:path={array},{SIZES}", settings, workdir, count, devices)


def start(config, settings, workdir, count, devices):
    """The processes of one run."""
    command = [sys.executable, "-m", "experiments.train", f"--config={config}",
               f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings)]
    return begin(command, count, devices)


def begin(command, count, devices):
    """The processes of one command."""
    port = free_port()
    together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"] * (count > 1)
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [*command, *together, *[f"--process_id={number}"] * (count > 1)], cwd=ROOT, env=env,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(count)
    ]


def finish(running):
    """(exit status, stdout, stderr) of each."""
    ends = [process.communicate(timeout=280) for process in running]
    return [(p.returncode, *end) for p, end in zip(running, ends, strict=True)]


@pytest.fixture(scope="module")
def alone(array, tmp_path_factory):
    """The parameters that one process on one device ends with."""
    folder = tmp_path_factory.mktemp("alone")
    ((code, _, err),) = finish(launch(array, folder, 1, 1))
    assert code == 0, err
    return scale_sae_jax.load(folder)[1]


@pytest.mark.parametrize(("count", "devices", "lost", "resumed"), [(2, 2, 1, 2), (4, 1, 0, 2)])
def test_a_lost_process_ends_the_others_and_a_restart_resumes(
    count, devices, lost, resumed, array, alone, tmp_path
):
    """With as many processes, or with others."""
    running = launch(array, tmp_path, count, devices)
    until = time.monotonic() + 200
    while not any(line["step"] >= 30 for line in read_lines(tmp_path / "metrics.jsonl")):
        assert all(p.poll() is None for p in running), finish(running)
        assert time.monotonic() < until
        time.sleep(0.05)
    running[lost].kill()
    ends = finish(running)
    for number, (code, out, err) in enumerate(ends):
        if number != lost:
            # Where process 0 dies, with the service that JAX runs in it, JAX may be faster.
            told = "another process was lost" in err or (lost == 0 and "another task died" in err)
            assert code and told and "run:" not in out, (code, err)
    # The newest checkpoint is 20; a complete run follows, and only its lead speaks.
    ends = finish(launch(array, tmp_path, resumed, devices))
    assert [code for code, *_ in ends] == [0] * resumed, ends
    assert ["FVU" in out for _, out, _ in ends] == [True] + [False] * (resumed - 1)
    steps = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert steps == [1, 10, 20, 30, 40, 50, 60]
    _, params = scale_sae_jax.load(tmp_path)
    for name, value in alone.items():
        assert np.abs(params[name] - value).max() < 1e-5 * max(np.abs(value).max(), 1e-3), name


SYNTHETIC = {"d": 16, "samples": 4096, "heldout": 600, "roots": 2, "branching": 2, "depth": 1}


def test_known_features_are_measured_by_processes_that_split_the_experts(tmp_path):
    """The metrics are those of one device."""
    settings = ["steps=4", "batch_size=64", "eval.tokens=600", "eval.bootstrap=5",
                *(f"synthetic.{name}={value}" for name, value in SYNTHETIC.items())]
    config = f"configs/synthetic.py:features=24,{SIZES}"
    ends = finish(start(config, settings, tmp_path, 2, 1))
    assert [code for code, *_ in ends] == [0, 0], ends
    got = json.loads((tmp_path / "eval.json").read_text())
    sae, params = scale_sae_jax.load(tmp_path)
    _, heldout = open_synthetic(SyntheticConfig(features=24, **SYNTHETIC))
    for key, value in measure_ground_truth(sae, params, heldout, 600).items():
        assert got[key] == pytest.approx(value, abs=0.01), key


HARVEST = """
import sys
from pathlib import Path
from test_harvest import ACTIVATIONS, LM, model, text_config
from scale_sae_jax.activations.harvest import harvest
from scale_sae_jax.parallel import processes

folder, port, most, number = sys.argv[1:]
processes.join(f"127.0.0.1:{port}", 2, int(number))

def progress(done, total):
    if done > int(most):
        sys.exit(7)

harvest(model(), text_config(Path(folder)), ACTIVATIONS, LM, Path(folder) / "store", progress)
"""


def harvest_together(folder, most):
    """Exit statuses of two processes that harvest into `folder`, and stop when `most` are kept."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HARVEST, str(folder), str(free_port()), str(most)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running = [
        subprocess.Popen([*command, number], env=env, text=True, **pipes) for number in "01"
    ]
    return finish(running)


def test_each_process_harvests_its_own_documents(tmp_path):
    """Both stop in step and go on; the files are those of one process with the same two parts."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    for folder in (both, alone):
        folder.mkdir()
        text = text_config(folder)
    ends = harvest_together(both, 600)
    assert {code for code, *_ in ends} == {7}, ends
    assert not store.read_manifest(both / "store").complete
    ends = harvest_together(both, 10**9)
    assert {code for code, *_ in ends} == {0}, ends
    begin_parts(2, model(), text, ACTIVATIONS, alone / "store")
    harvest(model(), text, ACTIVATIONS, LM, alone / "store")
    made, expected = files(both / "store"), files(alone / "store")
    assert made.keys() == expected.keys()
    for name, content in made.items():  # norms are compiled otherwise in tests, to the last bit
        assert content == expected[name] or name.endswith(store.MANIFEST), name
    assert store.open_store(both / "store").n == ACTIVATIONS.tokens
    hashes = [set(store.load_documents(both / "store" / f"part-0000{part}").tolist())
              for part in (0, 1)]
    texts = [document_hash(d.text) for d in training_documents(text)]
    assert hashes[0] <= set(texts[::2]) and hashes[1] <= set(texts[1::2])


def test_a_users_mistake_ends_every_process_and_is_told_by_the_lead(array, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.json").write_text("{")
    ends = finish(launch(array, tmp_path, 2, 1))
    assert [code for code, *_ in ends] == [2, 2]
    assert ["config.json is not valid JSON" in err for *_, err in ends] == [True, False], ends
    assert all("Traceback" not in err for *_, err in ends)


def test_a_mistake_that_all_find_at_once_ends_them_in_seconds(array, tmp_path):
    """The lead may find it before the other has connected."""
    begun = time.monotonic()
    ends = finish(start(f"configs/array.py:path={array},{SIZES}", ["sae.k=99"], tmp_path, 2, 1))
    assert [code for code, *_ in ends] == [2, 2], ends
    assert ["config.sae.k (l0) = 99" in err for *_, err in ends] == [True, False], ends
    assert all("Fatal" not in err for *_, err in ends)
    assert time.monotonic() - begun < 60  # JAX waits for a lost process for longer


ALONE = """
from experiments import command_line
from scale_sae_jax.errors import UserError
from scale_sae_jax.parallel import processes

def main():
    if not processes.leads():
        raise UserError("no activation is left")
    processes.any_of(False)  # waits for the other

command_line.start(main, lambda argv: None, processes_join=True)
"""


def test_a_process_that_fails_alone_ends_the_other_with_the_reason():
    ends = finish(begin([sys.executable, "-c", ALONE], 2, 1))
    assert [code for code, *_ in ends] == [2, 2], ends
    assert ["error: no activation is left" in err for *_, err in ends] == [True, False], ends


# An array is evaluated again on its own held-out part, as others are on a text: `cell` refuses it.
GRID = """
import dataclasses
from configs import array
from scale_sae_jax.config import TextConfig
from scale_sae_jax.sweep import axis, cell, product

def get_grid(arg):
    small = {"steps": 4, "batch_size": 64, "log_every": 2, "eval.tokens": 128, "eval.bootstrap": 5}
    cells = [
        cell(axes, array.get_config(f"path={axes['path']},l0=4,experts=4,latents=64"), small)
        for axes in product(axis("path", arg.split("+")))
    ]
    return [dataclasses.replace(one, texts={"again": TextConfig()}) for one in cells]
"""


LOAD = """
import scale_sae_jax
from experiments import command_line
command_line.start(lambda: scale_sae_jax.load({!r}), lambda argv: None, processes_join=True)
"""


def test_a_failed_cell_ends_a_sweep_of_several_processes(array, tmp_path):
    """They may fail apart, and then wait for one another in different cells."""
    grid = tmp_path / "grid.py"
    grid.write_text(GRID)
    absent = tmp_path / "absent.npy"
    command = [sys.executable, "-m", "experiments.sweep", f"--workdir={tmp_path / 'sweep'}",
               f"--grid={grid}:{array}+{absent}"]
    ends = finish(begin(command, 2, 1))
    assert [code for code, *_ in ends] == [2, 2], ends
    for told in ("absent.npy: file not found", "with several processes a failed cell ends"):
        assert [told in err for *_, err in ends] == [True, False], ends
    assert len((tmp_path / "sweep" / "results.csv").read_text().splitlines()) == 2
    (run,) = (path.parent for path in (tmp_path / "sweep").rglob("cell.json"))
    results = json.loads((run / "cell.json").read_text())["results"]
    assert results["again_fvu"] == pytest.approx(results["fvu"], rel=1e-5)
    ends = finish(begin([sys.executable, "-c", LOAD.format(str(run))], 2, 1))
    assert [code for code, *_ in ends] == [0, 0], ends


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(coordinator="127.0.0.1:1"), "belong together"),
        (dict(num_processes=2, process_id=0), "belong together"),
        (dict(coordinator="127.0.0.1:1", num_processes=2, process_id=2), "must lie below 2"),
    ],
)
def test_half_an_answer_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        processes.join(**flags)


def test_one_process_asks_nobody():
    assert processes.leads() and processes.any_of(True) and not processes.any_of(False)
    assert processes.lead_alone(lambda: 5) == 5
    with pytest.raises(UserError, match="no"):
        processes.lead_alone(_refuse)


def _refuse():
    raise UserError("no")
