"""The commands as a user calls them: whole runs, kills, evaluation, and mistakes told in a line."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_model import VOCAB, WIDTH, write_model

import scale_sae_jax
from scale_sae_jax.config import ActivationsConfig, Config
from scale_sae_jax.sae import build
from scale_sae_jax.training import state
from scale_sae_jax.training.checkpoints import Checkpoints
from scale_sae_jax.training.metrics import read_lines
from scale_sae_jax.training.optim import optimiser
from scale_sae_jax.workdir import read_config

ROOT = Path(__file__).parent.parent
STEPS = 1500
COSINES = ("redundancy_0.7", "redundancy_0.8", "redundancy_0.9", "max_cosine_mean")
KEYS = set(
    """mse fvu fvu_all cosine norm_ratio relative_bias l0 l0_p5 l0_p95 dead density
    ce_clean ce_spliced ce_mean ce_zero delta_ce recovered recovered_mean kl
    expert_load load_cv router_entropy expert_mi flops_per_token active_width total_width params
    tokens_seen train_seconds tokens_per_second seconds_per_step""".split()
) | {name + split for name in COSINES for split in ("", "_intra", "_inter", "_null")}
NEEDS_TEXT = {"ce_clean", "ce_spliced", "ce_mean", "ce_zero", "delta_ce", "kl", "expert_mi"}


def test_commands_start_without_what_is_slow_to_import():
    loaded = "import sys, experiments.train, experiments.sweep; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True)
    assert "jax" in out.stdout.split(), out.stderr
    assert not {"torch", "datasets", "transformers", "tensorboardX"} & {*out.stdout.split()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A random GPT-2 of two blocks with its tokenizer, two texts, and arrays of activations."""
    folder = tmp_path_factory.mktemp("data")
    documents = [text[:2000] for text in topics.values()]
    for name, texts in (("docs", documents), ("other", [text[::-1] for text in documents[:8]])):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    write_model(folder / "gpt2", documents)
    rng = np.random.default_rng(0)
    np.save(folder / "acts.npy", rng.normal(size=(2000, 16)).astype(np.float32))
    np.save(folder / "solid.npy", np.zeros((4, 4, 4), np.float32))
    np.save(folder / "nan.npy", np.full((40, 4), np.nan, np.float32))
    return folder


def flags(workdir, config, **settings):
    named = (f"--config.{name}={value}" for name, value in settings.items())
    return [f"--config=configs/{config}", *named, f"--workdir={workdir}"]


def text_flags(data, workdir, arg="l0=4,experts=4,latents=64"):
    lm = {"lm.path": data / "gpt2", "lm.layer": 0, "lm.rows_per_batch": 4}
    text = {"text.path": data / "docs.jsonl", "text.heldout_fraction": 0.2, "text.context": 32}
    settings = {"batch_size": 64, "steps": 30, "eval.tokens": 512, **lm, **text}
    return flags(workdir, f"owt.py:{arg}", **settings)


def array_flags(data, workdir, array="acts"):
    arg = f"path={data}/{array}.npy,l0=4,experts=4,latents=64"
    settings = {"batch_size": 64, "steps": STEPS, "log_every": 10, "checkpoint_every": 100}
    return flags(workdir, f"array.py:{arg}", **settings)


def begin(command, *args):
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{command}", *args],
        **{"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )


def call(command, *args):
    """stdout of a command that must succeed."""
    with begin(command, *args) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "error" not in err
    return out


def results(workdir):
    return json.loads((workdir / "eval.json").read_text())


# From a language model


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a run on the small model, and what the command printed."""
    workdir = tmp_path_factory.mktemp("runs") / "text"
    return workdir, call("train", *text_flags(data, workdir))


def test_train_fills_the_folder_of_the_run(trained, data):
    workdir, out = trained
    names = {path.name for path in workdir.iterdir()}
    folders = {"activations", "checkpoints", "tensorboard", "evals"}
    locks = {".run.lock", ".activations.lock"}
    assert names - locks == folders | {"config.json", "metrics.jsonl", "eval.json"}
    assert all(any((workdir / name).iterdir()) for name in folders)
    assert read_config(workdir).steps == 30
    assert [line["step"] for line in read_lines(workdir / "metrics.jsonl")] == [1, 30]

    found = results(workdir)
    assert set(found) >= KEYS
    assert all(found[key] is not None for key in KEYS)
    assert 0 < found["fvu"] < 1 and 0 < found["l0"] <= 4
    assert found["tokens_seen"] == 30 * 64 and 400 <= found["eval_tokens"] <= 512
    assert found["ce_clean"] == pytest.approx(np.log(VOCAB), rel=0.1)  # of a random model
    assert "FVU" in out and f"{found['fvu']:.4f}" in out and str(workdir) in out
    sae, params = scale_sae_jax.load(workdir)
    assert (sae.width, sae.latents, sae.k) == (WIDTH, 64, 4)
    assert sae.encode(params, np.ones((2, WIDTH), np.float32)).ids.shape == (2, 4)


def test_evaluate_repeats_the_result_and_takes_other_texts(trained, data):
    workdir, _ = trained
    before = results(workdir)
    call("evaluate", "--workdir", str(workdir), "--step=best")
    assert results(workdir) == before
    call("evaluate", f"--workdir={workdir}", f"--config.text.path={data}/other.jsonl")
    assert results(workdir) == before and before["step"] == 30
    (path,) = (workdir / "evals").glob("other-*.json")
    other = json.loads(path.read_text())
    assert set(other) >= KEYS and other["eval_text"] == f"{data}/other.jsonl"
    assert other["fvu"] != before["fvu"] and other["tokens_seen"] == before["tokens_seen"]
    text = {"text.path": data / "docs.jsonl", "text.where": "", "text.context": 16}
    call("evaluate", *flags(workdir, "biomedical.py", **{"eval.tokens": 64, **text}))
    assert results(workdir) == before and read_config(workdir).eval.tokens == 512
    assert json.loads((workdir / "evals" / "docs.json").read_text()) == before
    (path,) = (workdir / "evals").glob("docs-*-eval-*.json")
    docs = json.loads(path.read_text())
    assert docs["eval_tokens"] <= 64 and docs["eval_text"] == before["eval_text"]


# From an array, stopped and killed


def wait_for_step(process, workdir, step):
    """Returns once a record of `step` or later is written."""
    until = time.monotonic() + 90
    while not any(line["step"] >= step for line in read_lines(workdir / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=9)
        time.sleep(0.02)


def final_state(workdir):
    config = read_config(workdir)
    sae = build(config.sae, 16)
    tx = optimiser(config.optim, config.sae.latents, config.steps, config.sae.decoder_norm)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest == STEPS
        return jax.tree.leaves(checkpoints.restore(STEPS, state.abstract(sae, tx, config.optim)))


def test_sigterm_and_sigkill_leave_the_result_bit_identical(data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = begin("train", *array_flags(data, whole))
    with begin("train", *array_flags(data, broken)) as first:
        wait_for_step(first, broken, 200)
        first.send_signal(signal.SIGTERM)
        out, err = first.communicate(timeout=60)
    assert first.returncode == 0 and "Traceback" not in err
    assert "saved at step" in out and "same command goes on" in out and str(broken) in out
    with Checkpoints(broken / "checkpoints") as checkpoints:
        saved = checkpoints.latest
    assert saved < STEPS - 300

    with begin("train", *array_flags(data, broken)) as second:
        wait_for_step(second, broken, saved + 150)
        second.send_signal(signal.SIGKILL)
        second.communicate(timeout=60)
    assert second.returncode == -signal.SIGKILL
    assert not (broken / "eval.json").exists()

    call("train", *array_flags(data, broken))
    out, err = reference.communicate(timeout=120)
    assert reference.returncode == 0, err
    for ours, theirs in zip(final_state(broken), final_state(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (read_lines(folder / "metrics.jsonl") for folder in (broken, whole))
    assert [(r["step"], r["loss"]) for r in ours] == [(r["step"], r["loss"]) for r in theirs]
    found = results(whole)
    assert set(found) >= KEYS and {key for key in KEYS if found[key] is None} >= NEEDS_TEXT
    assert "delta CE           -" in out and found["fvu"] == results(broken)["fvu"] < 0.6


# To other libraries


def test_export_writes_the_cache_of_the_heldout_text_and_a_directory(trained, data, tmp_path):
    run = f"--workdir={trained[0]}"
    out = call("export", run, "--format=delphi", f"--to={tmp_path}/cache", "--splits=4")
    heldout = int(re.search(r"evaluated on +([\d,]+)", trained[1])[1].replace(",", ""))
    folder = tmp_path / "cache/layers.0"
    splits = [load_file(folder / f"{16 * i}_{16 * i + 15}.safetensors") for i in range(4)]
    fired = sum(len(split["activations"]) for split in splits)
    assert f"{fired:,} activations" in out and 0 < fired <= 4 * heldout
    rows, context = splits[0]["tokens"].shape
    assert context == 32 and rows * context >= heldout
    positions = {tuple(place) for split in splits for place in split["locations"][:, :2].tolist()}
    assert len(positions) <= heldout and not any(position == 0 for _, position in positions)
    assert json.loads((folder / "config.json").read_text())["model_name"] == "gpt2"

    call("export", run, "--format=sae_lens", f"--to={tmp_path}/lens", "--model_name=small")
    cfg = json.loads((tmp_path / "lens/cfg.json").read_text())
    assert cfg["architecture"] == "scale_moe" and cfg["metadata"]["context_size"] == 32
    assert cfg["metadata"]["model_name"] == "small" and str(data) not in json.dumps(cfg)
    x = np.load(data / "acts.npy")[:64].repeat(2, -1)
    one, other = (scale_sae_jax.load(path) for path in (trained[0], tmp_path / "lens"))
    expected, found = (sae.reconstruct(params, x) for sae, params in (one, other))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


# Mistakes

# Imports once, then forks for each command: a fresh process as a user's, without its start.
FORKING = """
import json, os, runpy, sys
import scale_sae_jax.run, experiments.command_line, experiments.console
from transformers import AutoConfig
for number, (command, *args) in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv = [command, *args]
        try:
            runpy.run_module(f"experiments.{command}", run_name="__main__", alter_sys=True)
        except SystemExit as stopped:
            os._exit(stopped.code)  # tearing down the interpreter takes a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def mistakes(data, tmp_path):
    """(command and arguments, what the one line must name)."""
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "grid.py").write_text("def get_grid(arg=''):\n    return []\n")
    (tmp_path / "broken.py").write_text("def get_config(arg=''):\n    return 1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "none.py").write_text("def get_config(arg=''):\n    pass\n")
    (tmp_path / "words.py").write_text(
        "from configs import array\n\ndef get_config(arg=''):\n    config = array.get_config(arg)\n"
        "    config.sae.latents = 'many'\n    return config\n"
    )
    new = tmp_path / "run"
    text = text_flags(data, new)

    def sizes(arg):
        return ["train", *text_flags(data, new, arg)]

    return [
        (sizes("l0=64,experts=4,latents=64"), "config.sae.k (l0) = 64"),
        (sizes("latents=65,experts=4"), "config.sae.latents = 65"),
        (sizes("latents=64,experts=4,active=5"), "config.sae.active = 5"),
        (sizes("nonsense=1"), "config argument 'nonsense'"),
        (sizes("preset=papers"), "preset 'papers'"),
        (["train", *text, "--config.lm.layer=2"], "config.lm.layer = 2"),
        (["train", *text, "--config.text.path=absent.jsonl"], "absent.jsonl"),
        (["train", *text, "--config.lm.path=./absent"], "./absent"),
        (["train", *text, "--config.lm.path=someone/model"], "--config.lm.path=FOLDER"),
        (["train", *text, "--config.text.context=65"], "config.text.context = 65"),
        (["train", *text, "--config.foo=1"], "--config.foo"),
        (["plan", f"--config={tmp_path}/empty.py"], "defines no get_config()"),
        (["plan", f"--config={tmp_path}/words.py:path=a.npy"], "a.npy, line 5: TypeError"),
        (["plan", f"--config={tmp_path}/none.py"], "get_config() returns nothing"),
        (["plan", "--config=configs/owt.py", "--d=8", "--mesh=data:2", "--memory_gb=nan"], "=nan"),
        (["sweep", f"--grid={tmp_path}/empty.py", f"--workdir={new}"], "defines no get_grid()"),
        (["train", *text, "--config.sae.k.x=1"], "--config.sae.k.x"),
        (["train", *text, "--config.steps=abc"], "--config.steps=abc"),
        (["train", *text, "--config.lm.dtype=float64"], "config.lm.dtype = 'float64'"),
        (["train", *text, "surplus"], "'surplus'"),
        (["train", "--config=configs/absent.py"], "run from the checkout, or give its full path"),
        (["train", f"--config={tmp_path}/broken.py"], "ZeroDivisionError"),
        (["train", f"--config={tmp_path}/grid.py:seeds=1"], "a grid: use experiments.sweep"),
        (["sweep", "--grid=configs/array.py", f"--workdir={new}"], "use experiments.train"),
        (["train"], "--config is missing"),
        (["sweep"], "--grid and --workdir are missing"),
        (["train", *array_flags(data, new, "absent")], "absent.npy"),
        (["train", *array_flags(data, new, "solid")], "(4, 4, 4)"),
        (["train", *array_flags(data, new, "nan")], "row 0"),
        (["train", *array_flags(data, data / "acts.npy" / "run")], "--workdir"),
        (["evaluate", "--workdir", str(data)], "config.json"),
        (["evaluate", f"--workdir={tmp_path}"], "not valid JSON"),
        (["evaluate"], "--workdir"),
        (["evaluate", "--config.text.path=a.jsonl"], "--workdir is missing: the settings"),
        (["evaluate", "--workdir=~/no/run"], f"{Path.home()}/no/run has no config.json"),
        (["export", f"--workdir={data}", "--format=sae_lens", f"--to={new}"], "no autoencoder"),
        (["export", f"--workdir={data}", "--format=onnx", f"--to={new}"], "--format"),
        (["export", f"--workdir={data}", "--format=sae_lens"], "--to"),
    ]


INTERRUPTED = """
from experiments import command_line

def main():
    raise KeyboardInterrupt

command_line.start(main, lambda argv: None)
"""


def test_ctrl_c_is_one_line():
    """Where a command has no other way to stop."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr.strip()) == (130, "stopped by Ctrl-C")


def test_help_lists_the_flags_that_commands_share():
    for command, names in (("train", "config coordinator"), ("dashboard", "workdir step"),
                           ("report", "where")):
        with begin(command, "--help") as process:
            out, _ = process.communicate(timeout=60)
        assert all(re.search(rf"^ +--{name}:", out, re.MULTILINE) for name in names.split()), out


def test_mistakes_are_told_in_one_line_with_status_2(data, tmp_path, trained):
    cases = mistakes(data, tmp_path)
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(trained[0] / name, hollow)
    (hollow / "eval.json").write_text("{}")
    cases += [(["plot", f"--workdir={hollow}"], "eval.json has no fvu")]
    of_array = dataclasses.asdict(Config(activations=ActivationsConfig(path="a.npy")))
    (tmp_path / "of_array").mkdir()
    (tmp_path / "of_array" / "config.json").write_text(json.dumps(of_array))
    cases += [(
        ["evaluate", f"--workdir={tmp_path}/of_array", "--config=configs/biomedical.py"],
        "was trained without a language model",
    )]
    run = f"--workdir={trained[0]}"
    cases += [
        (["evaluate", run, "--step=7"], "checkpoint 7: there are 30"),
        (["evaluate", run, "--config.foo=1"], "--config.foo"),
        (["evaluate", run, "--config.text.path=absent.jsonl"], "absent.jsonl"),
        (["evaluate", run, "--config.sae.k=1"], "--config.sae.k=1 would do nothing"),
        (["evaluate", run, "--config.activations.max_norm_ratio=0.5"], "the run has 10.0 and only"),
        (["evaluate", *text_flags(data, trained[0]), "--config.seed=1"], "--config.seed=1"),
        (["train", *text_flags(data, trained[0]), "--config.seed=1"], "config.seed = 0"),
        (["dashboard", run, "--latents=60-64"], "'60-64' must lie between 0 and 63"),
        (["dashboard", run, "--latents=5-3"], "'5-3' is in the wrong order: write 3-5"),
        (["dashboard", run, f"--to={trained[0]}"], "is not empty"),
        (["dashboard", run, "--config.eval.tokens=9"], "only config.text may change"),
        (["dashboard", run, "--latents=all"], "'all' is no id and no range"),
        (["dashboard", run, "--neuronpedia=model"], "MODEL_ID/SAE_SET"),
        (["dashboard", f"--workdir={data}"], "config.json"),
        (["export", run, f"--to={data}", "--format=sae_lens"], "is not empty"),
        (["export", run, f"--to={tmp_path}/a", "--format=sparsify"], "a router masks"),
        (["export", run, f"--to={tmp_path}/a", "--format=gemma_scope"], "a router masks"),
        (["export", run, f"--to={tmp_path}/a", "--format=sae_lens", "--expert=0"], "2 experts"),
        (["export", run, f"--to={tmp_path}/a", "--format=delphi", "--sae_id=b"], "--sae_id is for"),
        (["export", run, f"--to={tmp_path}/a", "--format=sae_lens", "--splits=3"],
         "--splits is for"),
        (["export", run, "--to=nobody", "--format=hub"], "owner/name"),
        (["export", run, f"--to={tmp_path}/a", "--format=delphi", "--config.sae.k=1"],
         "only config.text and config.eval.tokens may change"),
        (["export", run, f"--to={tmp_path}/a", "--format=sae_lens", "--config.eval.tokens=9"],
         "no setting may change"),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING, str(tmp_path)],
        **{"input": json.dumps([args for args, _ in cases]), "text": True, "timeout": 120},
        **{"cwd": ROOT, "stdout": subprocess.PIPE},
    )
    assert done.returncode == 0
    for number, ((args, part), status) in enumerate(zip(cases, done.stdout.split(), strict=True)):
        lines = (tmp_path / str(number)).read_text().splitlines()
        assert (status, len(lines)) == ("2", 1), (args, lines)
        assert lines[0].startswith("error: ") and part in lines[0], (args, lines)
