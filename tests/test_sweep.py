"""Grids of runs: their cells, what they share, kills and failures, the results and the table."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from threading import Event

import jax
import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from jax.experimental.compilation_cache import compilation_cache
from scipy import stats
from test_commands import (
    FORKING,
    ROOT,
    WIDTH,
    begin,
    data,  # noqa: F401
    wait_for_step,
    write_model,
)

import scale_sae_jax
from experiments import sweep as command
from experiments import table
from scale_sae_jax import sweep
from scale_sae_jax.activations.array import ActivationArray
from scale_sae_jax.company import check_together, company
from scale_sae_jax.config import Config, LMConfig, TextConfig, digest, to_config_dict
from scale_sae_jax.errors import UnwrittenError, UserError
from scale_sae_jax.results import read_rows
from scale_sae_jax.sae import build
from scale_sae_jax.sources import Heldout, Sources, open_sources, read_heldout
from scale_sae_jax.sweep import axis, cell, product
from scale_sae_jax.training import together
from scale_sae_jax.training.interrupts import Interrupted
from scale_sae_jax.training.metrics import read_lines

TIMES = {"train_seconds", "tokens_per_second", "seconds_per_step", "command"}
COMMAND = ["python", "-m", "experiments.sweep"]
GRID = """
from configs import array
from scale_sae_jax.sweep import axis, cell, product

def get_grid(arg=""):
    cells = []
    for axes in product(axis("array", ("absent", "acts")), axis("seed", [3])):
        settings = array.get_config(
            f"path=FOLDER/{axes['array']}.npy,l0=4,experts=4,latents=64,preset=plain,seed=3"
        )
        small = {"steps": int(arg), "batch_size": 64, "log_every": 10, "sae.auxk": False}
        small |= {"checkpoint_every": 50, "eval.bootstrap": 10}
        cells.append(cell(axes, settings, small))
    return cells
"""


def settings(path="acts.npy", **changes):
    config = dataclasses.replace(Config(), **changes)
    activations = dataclasses.replace(config.activations, path=str(path))
    return to_config_dict(dataclasses.replace(config, activations=activations))


def cells_of(*factors, **changes):
    return [cell(axes, settings(**changes)) for axes in product(*factors)]


def refusal(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Grids


def test_a_product_varies_the_last_list_fastest_and_lists_add_up():
    points = product(axis("a", "xy"), axis("b", range(2)) + [{"b": 5, "c": True}])
    assert points == [
        {"a": a, **rest} for a in "xy" for rest in ({"b": 0}, {"b": 1}, {"b": 5, "c": True})
    ]
    assert product() == [{}] and product(axis("a", "xy"), []) == []


@pytest.mark.parametrize(
    "name, cells",
    (
        ("architectures.py:seeds=2", 32),
        ("architectures.py:data=synthetic,only=topk+ours,seeds=1", 3),
        ("learning_rates.py", 40),
        ("ours.py:seeds=2", 30),
        ("l0_by_experts.py:data=owt,rates=published,seeds=1", 39),
        ("l0_by_experts.py", 117),
        ("active.py", 60),
        ("feature_scaling.py", 24),
        ("experts.py:seeds=1", 15),
        ("granularity.py:seeds=1", 8),
        ("load_balance.py:seeds=1", 10),
        ("gate.py:seeds=1", 20),
        ("biomedical.py", 15),
        ("reproduction.py", 165),
    ),
)
def test_the_grids_of_this_project_have_their_cells(name, cells):
    grid = sweep.read_grid(f"configs/grids/{name}")
    assert len(grid) == cells
    known = [c for c in grid if c.config.sae.match != "time"]  # that is measured by the run
    for made in known:
        build(made.config.sae, 8)
    widths = {c.name: build(c.config.sae, 8).config for c in known if "seed=0" in c.name}
    if "architectures" in name:
        active = {c.active * c.latents // c.experts for n, c in widths.items() if "-active" in n}
        assert active == {512}


def test_a_text_of_ones_own_leaves_behind_what_fits_the_grids_text():
    (given,) = sweep.read_grid("configs/grids/experts.py:seeds=1,text=a.jsonl")[:1]
    (usual,) = sweep.read_grid("configs/grids/experts.py:seeds=1")[:1]
    assert usual.config.text.where.startswith("topic!=")
    assert given.config.text == TextConfig(path="a.jsonl")


def test_a_cell_keeps_its_axes_and_takes_overrides():
    axes = {"preset": "top/k", "seed": 3, "lr": 0.1}
    made = cell(axes, settings(), {"steps": 7, "eval.tokens": 9, "optim.lr": 1})
    assert made.axes == axes and made.name == "top_k-seed=3-lr=0.1"
    assert (made.config.steps, made.config.eval.tokens, made.config.optim.lr) == (7, 9, 1.0)
    for wrong, part in (({"eval.token": 9}, "eval.token is unknown"), ({"steps": 0}, "steps")):
        assert f"config.{part}" in refusal(lambda wrong=wrong: cell(axes, settings(), wrong))


def test_a_filter_is_any_of_several_parts_and_a_whole_name_is_that_cell_alone():
    cells = cells_of(axis("preset", ("topk", "batchtopk", "switch")), axis("seed", (1, 10)))

    def kept(text):
        return [here.name for here in sweep.select(cells, text)]

    assert len(kept("")) == 6 and len(kept("topk")) == 4 and len(kept("batch,switch")) == 4
    assert kept("seed=1") == [here.name for here in cells]
    assert kept("topk-seed=1") == ["topk-seed=1"]
    assert "no such cell" in refusal(lambda: kept("gated"))


def test_cells_share_what_decides_their_activations(tmp_path):
    text = {"lm": dataclasses.replace(Config().lm, path="lm")}
    text["text"] = dataclasses.replace(Config().text, path="docs.jsonl")
    here = cell({}, settings("", **text))
    one, seed, width, layer, tokens = (
        sweep.place(cell({}, settings("", **text), change), tmp_path).config
        for change in ({}, {"seed": 1}, {"sae.k": 3}, {"lm.layer": 1}, {"eval.tokens": 9})
    )
    path = one.activations.path
    assert path.startswith(f"{tmp_path}/activations-") and layer.activations.path != path
    assert seed.activations.path == width.activations.path == tokens.activations.path == path
    assert sweep.inputs_key(one) == sweep.inputs_key(seed) == sweep.inputs_key(width)
    assert len({sweep.inputs_key(config) for config in (one, layer, tokens)}) == 3
    inside = sweep.place(here, ROOT / "runs" / "x").config.activations.path
    assert inside.startswith("runs/x/activations-")
    own = cell({}, settings())
    assert sweep.place(own, tmp_path) == own


def test_cells_on_a_stream_have_no_store_and_share_where_they_draw_the_same_batches(tmp_path):
    text = dataclasses.replace(Config().text, path="docs.jsonl")
    source = settings("", lm=dataclasses.replace(Config().lm, path="lm"), text=text)

    def key(**changes):
        here = cell({}, source, {"activations.buffer": 2, **changes})
        assert sweep.place(here, tmp_path) == here
        return sweep.inputs_key(here.config)

    first = {"seed": 0, "batch_size": 64, "steps": 9, "mesh": "", "sae.experts": 4}
    first |= {"activations.tokens": 5, "sae.k": 4}
    other = {"seed": 1, "batch_size": 128, "steps": 8, "mesh": "data:1,expert:1", "sae.experts": 2}
    keys = {key(**first | {name: value}) for name, value in other.items()}
    assert len(keys | {key(**first)}) == 1 + len(other)
    assert key(**first) == key(**first, **{"optim.lr": 1.0}) == key(**first | {"sae.k": 3})


# Running, with the run itself left out


@pytest.fixture
def fake(monkeypatch):
    """Replaces opening, reading and running; returns the calls. A seed of 13 fails."""
    calls, zeros = [], np.zeros((2, 3), np.float32)
    part = ActivationArray(zeros, zeros[0], 1.0)
    opened = {}

    def run(config, folder, stop, console, sources, heldout):
        assert opened[id(sources.train)] == config.activations.path
        assert heldout == Heldout([], 0, 0)
        calls.append(folder.name)
        folder.mkdir(exist_ok=True)
        if config.seed == 13:
            raise ValueError("bad\nluck")
        if stop.is_set():
            raise Interrupted("stopped")
        return {"fvu": config.seed / 10, "fvu_ci95": [0.0, 1.0], "load": [1, 2], "kl": None}

    def open_sources(config, *_):
        calls.append(f"sources {config.activations.path}")
        train = dataclasses.replace(part)
        opened[id(train)] = config.activations.path
        return Sources(train, part, None)

    monkeypatch.setattr(sweep, "check_run", lambda config: None)
    monkeypatch.setattr(sweep, "check_rows", lambda config, sources: None)
    monkeypatch.setattr(sweep, "open_sources", open_sources)
    monkeypatch.setattr(sweep, "read_heldout", lambda *_: Heldout([], 0, 0))
    monkeypatch.setattr(sweep, "run", run)
    return calls


def fake_cells(seeds, arrays=("a", "b")):
    points = product(axis("array", arrays), axis("seed", seeds))
    return [cell(p, settings(f"{p['array']}.npy"), {"seed": p["seed"]}) for p in points]


def test_a_stream_is_let_go_unless_the_next_cell_takes_it(tmp_path, fake, monkeypatch):
    points = product(axis("k", (4, 8)), axis("seed", (0, 1)))
    monkeypatch.setattr(sweep, "finished", lambda *_: None)
    text = {"lm": LMConfig(path="lm"), "text": TextConfig(path="text")}
    for buffer, opened in ((0, 1), (2, 4)):
        fake.clear()
        stream = {"activations.buffer": buffer}
        grid = [
            cell(p, settings("", **text), {"seed": p["seed"], "sae.k": p["k"], **stream})
            for p in points
        ]
        assert command.run_cells(grid, grid, tmp_path, Event(), COMMAND) == []
        assert sum(call.startswith("sources") for call in fake) == opened


def test_cells_run_in_order_and_share_and_finished_ones_are_skipped(tmp_path, fake, capsys):
    grid = fake_cells((0, 1))
    assert command.run_cells(grid[:3], grid, tmp_path, Event(), COMMAND) == []
    expected = ["sources a.npy", "a-seed=0", "a-seed=1", "sources b.npy", "b-seed=0"]
    assert fake == expected
    out = capsys.readouterr().out.splitlines()
    names = ["cell", *(name for name in expected if "seed" in name)]
    assert [line.split()[0] for line in out] == names
    assert out[0].split()[1:3] == ["FVU", "delta"] and out[2].split()[1:3] == ["0.1000", "-"]
    assert re.fullmatch(r"\d+:\d\d:\d\d", out[1].split()[-1])  # of the two cells that are left
    fake.clear()
    assert command.run_cells(grid, grid, tmp_path, Event(), COMMAND) == []
    assert fake == ["sources b.npy", "b-seed=1"]
    assert len(capsys.readouterr().out.splitlines()) == 5

    fake.clear()  # other settings are another cell; a damaged record is no record
    changed = [cell(grid[0].axes, settings("a.npy"), {"steps": 5}), *grid[1:]]
    (tmp_path / "b-seed=1" / "cell.json").write_text("{")
    command.run_cells(changed, changed, tmp_path, Event(), COMMAND)
    assert fake == ["sources a.npy", "a-seed=0", "sources b.npy", "b-seed=1"]


def test_a_cell_that_fails_is_told_and_the_rest_go_on(tmp_path, fake, capsys, monkeypatch):
    grid = fake_cells((0, 13, 1), "a")
    assert command.run_cells(grid, grid, tmp_path, Event(), COMMAND) == ["a-seed=13"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2] == "a-seed=13  failed: ValueError: bad luck"
    trace = (tmp_path / "a-seed=13" / "error.txt").read_text()
    assert "Traceback" in trace and "ValueError: bad" in trace
    assert pyarrow.parquet.read_table(tmp_path / "results.parquet")["seed"].to_pylist() == [0, 1]
    monkeypatch.setattr(sweep, "run", lambda *_: {"fvu": 0.0})
    assert command.run_cells(grid, grid, tmp_path, Event(), COMMAND) == []
    assert not (tmp_path / "a-seed=13" / "error.txt").exists()


def test_a_checkpoint_that_cannot_be_written_ends_the_sweep(tmp_path, fake, monkeypatch):
    """For the next cell's cannot be written either."""
    grid, begun = fake_cells((0, 1), "a"), []

    def full(config, folder, *_):
        begun.append(folder.name)
        raise UnwrittenError("no space left")

    monkeypatch.setattr(sweep, "run", full)
    with pytest.raises(UnwrittenError, match="no space left"):
        command.run_cells(grid, grid, tmp_path, Event(), COMMAND)
    assert begun == ["a-seed=0"]


@pytest.fixture
def no_folder_of_the_users():
    mine = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", mine)
    compilation_cache.reset_cache()


def test_cells_of_one_shape_share_compiled_programs(no_folder_of_the_users):
    seen = []
    listen = lambda name, **_: seen.append(name)  # noqa: E731
    jax.monitoring.register_event_listener(listen)
    with command.shared_programs():
        for _ in range(2):
            jax.jit(lambda x: 3 * x + 1)(np.ones(7)).block_until_ready()
        folder = Path(jax.config.jax_compilation_cache_dir)
        assert any(folder.iterdir())
    jax.monitoring.unregister_event_listener(listen)
    assert seen.count("/jax/compilation_cache/cache_hits") >= 1
    assert jax.config.jax_compilation_cache_dir is None and not folder.exists()


def test_a_stop_ends_the_sweep_and_is_no_failure(tmp_path, fake):
    grid, stop = fake_cells((0, 1), "a"), Event()
    command.run_cells(grid[:1], grid, tmp_path, stop, COMMAND)
    stop.set()
    with pytest.raises(Interrupted, match="a-seed=1"):
        command.run_cells(grid, grid, tmp_path, stop, COMMAND)
    assert not (tmp_path / "a-seed=1").exists()


def test_columns_of_the_results(tmp_path, fake):
    grid = fake_cells((0, 1), "a")
    sweep.write_results(grid, tmp_path, COMMAND)
    assert "no finished cell" in refusal(lambda: read_rows(tmp_path))
    command.run_cells(grid[1:], grid, tmp_path, Event(), [*COMMAND, "--grid=a b.py"])
    alone = "python -m experiments.sweep '--grid=a b.py' --filter=a-seed=1"
    row = {"array": "a", "seed": 1, "fvu": 0.1, "fvu_ci95_lo": 0.0, "fvu_ci95_hi": 1.0, "kl": None}
    row |= {"folder": "a-seed=1", "command": alone}
    assert read_rows(tmp_path) == [row]
    assert read_rows(tmp_path, ["array=a", "seed=1"]) == [row]
    sweep.write_results(grid[:1], tmp_path, COMMAND)  # of which none is finished
    assert read_rows(tmp_path) == [row]
    wrong = {"seed=2": "there are 1", "lr=2": "no column 'lr'; the results have array, seed",
             "seed": "write COLUMN=VALUE"}
    for where, part in wrong.items():
        assert part in refusal(lambda: read_rows(tmp_path, [where]))
    text = pyarrow.csv.read_csv(tmp_path / "results.csv")
    assert text.column_names == list(row) and text.to_pylist() == [row]
    assert {path.name for path in tmp_path.iterdir()} == {
        "a-seed=1", "results.csv", "results.parquet"
    }


def test_grids_of_the_package_take_an_array():
    """Those that harvest elsewhere for tuning, too; not what needs a text to be evaluated on."""
    sizes = "data=array,path=x.npy,seeds=1,l0=4,experts=4,latents=64"
    for name in ("learning_rates", "ours", "architectures"):
        for here in sweep.read_grid(f"configs/grids/{name}.py:{sizes}"):
            assert here.config.activations.is_array and here.config.lm == Config().lm
    grid = f"configs/grids/biomedical.py:{sizes}"
    assert "evaluated on biomedical it needs a language model" in refusal(
        lambda: sweep.read_grid(grid)
    )


def test_an_axis_may_mix_words_and_numbers(tmp_path, fake):
    grid = [cell({"l": value}, settings()) for value in (1, "all", 2.5)]
    command.run_cells(grid, grid, tmp_path, Event(), COMMAND)
    assert [row["l"] for row in read_rows(tmp_path)] == ["1", "all", "2.5"]


# Whole runs


def test_cells_on_text_share_one_harvest_and_one_reading(data, tmp_path, monkeypatch):  # noqa: F811
    calls = []
    for original in (open_sources, read_heldout):
        def counted(*args, original=original):
            calls.append(original.__name__)
            return original(*args)

        monkeypatch.setattr(sweep, original.__name__, counted)
    small = {
        "lm.path": f"{data}/gpt2", "lm.rows_per_batch": 4, "text.path": f"{data}/docs.jsonl",
        "text.heldout_fraction": 0.2, "text.context": 32, "activations.tokens": 0,
        "sae.latents": 64, "sae.experts": 4, "sae.k": 4, "sae.auxk": False,
        "batch_size": 64, "steps": 10, "eval.tokens": 512, "eval.bootstrap": 10,
    }
    other = {"other": TextConfig(path=f"{data}/other.jsonl", context=32)}
    grid = [
        cell({"seed": seed}, to_config_dict(Config()), {**small, "seed": seed}, other)
        for seed in (0, 1)
    ]
    grid = [sweep.place(here, tmp_path) for here in grid]
    assert command.run_cells(grid, grid, tmp_path, Event(), COMMAND) == []
    assert calls == ["open_sources", "read_heldout", "read_heldout"]
    assert len(list(tmp_path.glob("activations-*"))) == 1
    rows = read_rows(tmp_path)
    assert all(row["delta_ce"] is not None and row["ce_clean"] for row in rows)
    assert rows[0]["ce_clean"] == rows[1]["ce_clean"] and rows[0]["fvu"] != rows[1]["fvu"]
    for row in rows:
        evals = [json.loads(p.read_text()) for p in (tmp_path / row["folder"] / "evals").iterdir()]
        (on_other,) = (e for e in evals if e["eval_text"].endswith("other.jsonl"))
        (found,) = (e for e in evals if e is not on_other)
        assert row["other_fvu"] == on_other["fvu"] != row["fvu"]
        assert row["other_eval_tokens"] == on_other["eval_tokens"] > 0
        assert json.loads((tmp_path / row["folder"] / "eval.json").read_text()) == found
        assert [row["fvu_ci95_lo"], row["fvu_ci95_hi"]] == found.pop("fvu_ci95")
        kept = {key: value for key, value in found.items() if not isinstance(value, list)}
        assert kept.items() <= row.items() and kept["eval_documents"] > 1
    sae, _ = scale_sae_jax.load(tmp_path / rows[0]["folder"])
    assert sae.latents == 64


def sweep_flags(folder, steps, workdir):
    (folder / "grid.py").write_text(GRID.replace("FOLDER", str(folder)))
    return [f"--grid={folder}/grid.py:{steps}", f"--workdir={workdir}"]


def test_a_killed_sweep_ends_with_the_same_results(data, tmp_path):  # noqa: F811
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = begin("sweep", *sweep_flags(data, 600, whole))
    with begin("sweep", *sweep_flags(data, 600, broken)) as first:
        wait_for_step(first, broken / "acts-seed=3", 100)
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=60)
    with begin("sweep", *sweep_flags(data, 600, broken)) as second:
        out, err = second.communicate(timeout=120)
    expected, _ = reference.communicate(timeout=120)
    assert second.returncode == reference.returncode == 1
    assert "Traceback" not in err and "error: failed: absent-seed=3 (" in err
    starts = [[line.split()[0] for line in text.splitlines()] for text in (out, expected)]
    assert starts[0] == starts[1] == ["cell", "absent-seed=3", "acts-seed=3", "1"]
    assert "absent.npy" in (broken / "absent-seed=3" / "error.txt").read_text()
    (ours,), (theirs,) = (read_rows(folder) for folder in (broken, whole))
    assert list(ours) == list(theirs)
    assert all(ours[key] == theirs[key] for key in ours.keys() - TIMES)


def test_the_papers_study_runs_at_a_reduced_size(tmp_path):
    """GPT-2 with random weights and ten blocks, in place of the one of 12."""
    write_model(tmp_path / "gpt2", [text[:2000] for text in topics.values()], 10, 128)
    pieces = [text[i : i + 200] for text in topics.values() for i in range(0, len(text), 200)]
    assert len(pieces) > 1500  # of which a two-hundredth is held out
    lines = [json.dumps({"text": piece}) + "\n" for piece in pieces]
    (tmp_path / "owt.jsonl").write_text("".join(lines))
    size = "steps=3,batch=64,latents=1024,experts=8,eval_tokens=256,seeds=1,tokens=256"
    grid = f"configs/paper/gpt2_owt.py:lm={tmp_path}/gpt2,text={tmp_path}/owt.jsonl,{size}"
    chosen = "--filter=scaling-authors-gain,error-k=32-topk-width"
    flags = [f"--grid={grid}", f"--workdir={tmp_path}/study", chosen]
    out, _ = begin("sweep", *flags, "--dry_run", f"--d={WIDTH}").communicate(timeout=120)
    flops = 3 * 192 * 2 * WIDTH * ((256 + 8 + 32) + (1024 + 32))
    assert out.splitlines()[-1] == (
        f"2 cells to run, 384 activations to train on, 256 to harvest, {flops:.3g} FLOP of training"
    )
    out, err = begin("sweep", *flags).communicate(timeout=280)
    assert "2 of 2 cells finished" in out, err
    rows = read_rows(tmp_path / "study", ["part=error"])
    assert [row["folder"] for row in rows] == ["error-k=32-topk-width-seed=0"]
    assert rows[0]["biomedical_delta_ce"] is not None and rows[0]["total_width"] == 1024


def test_seeds_share_a_width_that_is_matched_by_time(data, tmp_path, monkeypatch):  # noqa: F811
    asked = []

    def measure(config, width, batch_size):
        asked.append((config.k, width, batch_size))
        return 64 + 64 * len(asked)

    monkeypatch.setattr("scale_sae_jax.run.equal_time_latents", measure)
    time = {"sae.architecture": "topk", "sae.match": "time"}
    grid = array_cells(data, [(4, 0), (4, 1), (8, 0), (4, 2)], **time)
    assert command.run_cells(grid, grid, tmp_path, Event(), COMMAND) == []
    assert asked == [(4, 16, 64), (8, 16, 64)]
    assert [row["total_width"] for row in read_rows(tmp_path)] == [128, 128, 192, 128]


def test_a_cell_begun_with_other_steps_is_left_as_it_is(data, tmp_path, capsys):  # noqa: F811
    shorter = array_cells(data, [(4, 0)])
    assert command.run_cells(shorter, shorter, tmp_path, Event(), COMMAND) == []
    before = (tmp_path / "k=4-seed=0" / "metrics.jsonl").read_text()
    longer = array_cells(data, [(4, 0)], steps=60)
    assert command.run_cells(longer, longer, tmp_path, Event(), COMMAND) == ["k=4-seed=0"]
    assert "holds a cell of config.steps = 30, not 60" in capsys.readouterr().out
    assert (tmp_path / "k=4-seed=0" / "metrics.jsonl").read_text() == before


# Cells that train together


def array_cells(data, points, **overrides):  # noqa: F811
    """Cells on the array of `data`, by (k, seed)."""
    small = {
        "steps": 30, "batch_size": 64, "log_every": 10, "checkpoint_every": 10,
        "eval.bootstrap": 10, "sae.latents": 64, "sae.experts": 4, "sae.auxk": False,
    }
    return [
        cell({"k": k, "seed": seed}, settings(data / "acts.npy"),
             {**small, "sae.k": k, "seed": seed, **overrides})
        for k, seed in points
    ]


def test_who_trains_with_whom(data, tmp_path):  # noqa: F811
    def names(here, cells, most=3):
        return [other.name for other in company(here, cells, tmp_path, most)]

    a, b, c, d, e = grid = array_cells(data, [(4, 0), (4, 1), (8, 0), (8, 1), (8, 2)])
    longer, = array_cells(data, [(4, 9)], steps=31)
    assert names(a, grid) == ["k=4-seed=0", "k=4-seed=1", "k=8-seed=0"]
    assert names(a, [a, longer, b]) == ["k=4-seed=0", "k=4-seed=1"]
    for place, damaged in enumerate(({}, {"cells": 5}, {"cells": [["x"], a.name]})):
        (tmp_path / f"together-{place}").mkdir()
        (tmp_path / f"together-{place}" / "cells.json").write_text(json.dumps(damaged))
        assert names(a, grid) == ["k=4-seed=0", "k=4-seed=1", "k=8-seed=0"]
    assert names(a, grid, most=1) == names(longer, [*grid, longer]) == names(e, grid) == []
    time = {"sae.architecture": "topk", "sae.match": "time"}
    for alone in ({"mesh": "data:1,expert:1"}, {"wandb": True}, time):
        cells = array_cells(data, [(4, 0), (4, 1)], **alone)
        assert names(cells[0], cells) == []
    (tmp_path / b.name / "checkpoints").mkdir(parents=True)  # it was begun alone
    (tmp_path / c.name).mkdir()
    finished = {"config": dataclasses.asdict(c.config), "results": {}}
    (tmp_path / c.name / "cell.json").write_text(json.dumps(finished))
    assert names(a, grid) == ["k=4-seed=0", "k=8-seed=1", "k=8-seed=2"]
    stale = tmp_path / f"together-{digest({x.name: repr(x.config) for x in (c, d)})}"
    stale.mkdir()  # of a company whose cell c was finished in another way
    (stale / "cells.json").write_text(json.dumps({"cells": [c.name, d.name]}))
    assert names(a, grid) == ["k=4-seed=0", "k=8-seed=1", "k=8-seed=2"] and not stale.exists()


def test_cells_together_have_the_results_that_they_have_alone(data, tmp_path, capsys):  # noqa: F811
    grid = array_cells(data, [(4, 0), (4, 1), (8, 0)])
    for most in (1, 3):
        folder = tmp_path / str(most)
        folder.mkdir()
        assert command.run_cells(grid, grid, folder, Event(), COMMAND, most) == []
        assert not list(folder.glob("together-*"))
    assert "note: k=4-seed=0, k=4-seed=1, k=8-seed=0 train together" in capsys.readouterr().err
    for alone, ours in zip(*(read_rows(tmp_path / f) for f in ("1", "3")), strict=True):
        assert (alone.pop("trained_together"), ours.pop("trained_together")) == (1, 3)
        for key in alone.keys() - TIMES:
            if isinstance(alone[key], float):
                assert ours[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key
            else:
                assert ours[key] == alone[key], key
        assert ours["tokens_seen"] == 30 * 64


def test_a_company_that_was_stopped_goes_on_as_it_was(data, tmp_path, monkeypatch):  # noqa: F811
    grid = array_cells(data, [(4, 0), (4, 1), (8, 0)], steps_per_call=1)
    broken = tmp_path / "broken"
    for folder in (tmp_path / "whole", broken):
        folder.mkdir()
    command.run_cells(grid, grid, tmp_path / "whole", Event(), COMMAND, 2)
    original = together.train_together

    def crash(*args):
        def show(record):
            if record["step"] == 20:
                raise MemoryError("too little\nmemory")

        return original(*args[:5], show)

    monkeypatch.setattr("scale_sae_jax.company.train_together", crash)
    failed = command.run_cells(grid, grid, broken, Event(), COMMAND, 2)
    assert failed == ["k=4-seed=0", "k=4-seed=1"]  # and the third is done, alone
    assert [(broken / name / "error.txt").exists() for name in failed] == [True, True]
    (left,) = broken.glob("together-*")
    assert json.loads((left / "cells.json").read_text()) == {"cells": failed}
    monkeypatch.undo()
    assert command.run_cells(grid, grid, broken, Event(), COMMAND, 3) == []
    assert not left.exists() and not (broken / failed[0] / "error.txt").exists()
    for ours, theirs in zip(*map(read_rows, (broken, tmp_path / "whole")), strict=True):
        assert all(ours[key] == theirs[key] for key in ours.keys() - TIMES)
    lines = read_lines(broken / failed[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 10, 20, 30]


def test_cells_on_a_stream_train_with_those_that_draw_the_same_batches(data, tmp_path):  # noqa: F811
    small = {
        "lm.path": f"{data}/gpt2", "lm.rows_per_batch": 8, "text.path": f"{data}/docs.jsonl",
        "text.heldout_fraction": 0.2, "text.context": 32, "activations.buffer": 2,
        "sae.latents": 64, "sae.experts": 4, "sae.auxk": False,
        "steps": 4, "log_every": 2, "eval.tokens": 256, "eval.bootstrap": 5,
    }
    grid = [
        cell({"k": k, "batch": batch}, to_config_dict(Config()),
             {**small, "sae.k": k, "batch_size": batch})
        for k, batch in ((4, 64), (8, 64), (4, 128))
    ]
    grid = [sweep.place(here, tmp_path) for here in grid]
    other_seed = cell({"k": 4, "batch": 64}, to_config_dict(grid[0].config), {"seed": 1})
    assert company(grid[0], [grid[0], other_seed], tmp_path, 4) == []
    assert command.run_cells(grid, grid, tmp_path, Event(), COMMAND, 4) == []
    rows = read_rows(tmp_path)
    assert [row["trained_together"] for row in rows] == [2, 2, 1]
    assert [row["tokens_seen"] for row in rows] == [4 * 64, 4 * 64, 4 * 128]
    for here in grid:
        assert sweep.finished(here, tmp_path) is not None
        assert scale_sae_jax.load(tmp_path / here.name)[0].k == here.axes["k"]


def test_cells_do_not_train_together_in_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    check_together(1)
    assert "--together=4" in refusal(lambda: check_together(4))


# The table


def test_the_table_holds_means_and_students_intervals():
    rows = [
        {"preset": preset, "match": "width", "seed": seed, "fvu": fvu, "l0": 32.0, "params": 1000,
         "kl": None, "tokens_per_second": 12000.0 * fvu, "delta_ce": fvu if fvu < 0.4 else None}
        for preset, seed, fvu in (("b", 0, 0.1), ("a", 0, 0.25), ("b", 1, 0.2), ("b", 2, 0.5))
    ]
    columns = ["params", "l0", "fvu", "kl", "mcc", "tokens_per_second", "delta_ce"]
    lines = table.markdown(rows, ["preset", "match"], columns).splitlines()
    parts = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    shown = ["params", "l0", "fvu", "tokens_per_second", "delta_ce"]
    assert parts[0] == ["preset", "match", "seeds", *shown]
    assert parts[1] == ["---", "---", *6 * ["---:"]]

    low, high = stats.t.interval(
        0.95, 2, loc=np.mean([0.1, 0.2, 0.5]), scale=stats.sem([0.1, 0.2, 0.5])
    )
    pair = 12.706204736 * 0.05  # t(0.975, 1) by hand
    assert parts[2] == [
        "b", "width", "3", "1,000", "32.0 ± 0.0", f"0.2667 ± {(high - low) / 2:.4f}",
        f"3,200 ± {6000 * (high - low):,.0f}", f"0.1500 ± {pair:.4f}",
    ]
    assert parts[3] == ["a", "width", "1", "1,000", "32.0", "0.2500",
                        "3,000", "0.2500"]
    assert "several cells of one seed" in refusal(lambda: table.markdown(rows, ["match"], ["fvu"]))
    assert "no column 'fvuu'" in refusal(lambda: table.markdown(rows, ["preset"], ["fvuu"]))
    assert "not a column of numbers" in refusal(
        lambda: table.markdown(rows, ["preset"], ["match"])
    )


def test_mistakes_are_told_in_one_line(data, tmp_path):  # noqa: F811
    _, work = sweep_flags(data, 10, tmp_path / "new")
    made = "[cell({}, to_config_dict(Config(activations=ActivationsConfig(path='a.npy'))))]"
    grids = {
        "broken": "1 / 0",
        "empty": "[]",
        "numbers": "[1]",
        "none": "None",
        "stepz": "[cell({'k': 4}, to_config_dict(Config()), {'stepz': 2})]",
        "steps": "[cell({'k': 4}, to_config_dict(Config()), {'steps': -2})]",
        "twins": made.format({}) + " * 2",
        "taken": made.format({"l0": 1}),
    }
    imports = "from scale_sae_jax.config import *\nfrom scale_sae_jax.sweep import cell\n"
    for name, text in grids.items():
        lines = f"{imports}def get_grid(arg):\n    return {text}\n"
        (tmp_path / f"{name}.py").write_text(lines)
    (tmp_path / "results.parquet").write_text("no parquet")
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "fvu": [0.1]}), tmp_path / "good.parquet")
    good, architectures = tmp_path / "good", "--grid=configs/grids/architectures.py"
    good.mkdir()
    (tmp_path / "good.parquet").rename(good / "results.parquet")
    grid = f"--grid={data}/grid.py:10"
    cases = [
        (["sweep", "--grid=absent.py", work], "absent.py"),
        (["sweep", grid], "--workdir"),
        (["sweep", grid, work, "--filter=nothing"], "no such cell"),
        (["sweep", grid, f"--workdir={data}/acts.npy/x"], "choose another --workdir"),
        (["sweep", f"--grid={tmp_path}/broken.py", work], "broken.py, line 4: ZeroDivisionError"),
        (["sweep", f"--grid={tmp_path}/none.py", work], "must return a list"),
        (["sweep", f"--grid={tmp_path}/stepz.py", work], "stepz.py: cell k=4: config.stepz is unk"),
        (["sweep", f"--grid={tmp_path}/steps.py", work], "steps.py: cell k=4: config.steps = -2"),
        (["sweep", f"--grid={tmp_path}/empty.py", work], "has no cells"),
        (["sweep", f"--grid={tmp_path}/numbers.py", work], "must return a list"),
        (["sweep", f"{architectures}:seeds=0", work], "seeds=0: a grid needs at least 1"),
        (["sweep", f"--grid={tmp_path}/twins.py", work], "two cells are called cell"),
        (["sweep", f"--grid={tmp_path}/taken.py", work], "axis 'l0'"),
        (["sweep", f"{architectures}:only=nothing", work], "only=nothing"),
        (["sweep", f"{architectures}:data=nothing", work], "data=nothing"),
        (["table", work, "--by=a"], "results.parquet"),
        (["table", f"--workdir={tmp_path}", "--by=a"], "damaged"),
        (["table", f"--workdir={good}", "--by=b"], "--by=b"),
        (["table", f"--workdir={good}"], "--by"),
    ]
    good_ones = [
        ["sweep", grid, work, "--dry_run", "--filter=acts"],
        ["table", f"--workdir={good}", "--by=a", f"--output={tmp_path}/table.md"],
    ]
    forking = FORKING.replace("(stopped.code)", "(stopped.code or 0)")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", forking, str(tmp_path)],
        input=json.dumps([args for args, _ in cases] + good_ones),
        text=True, timeout=120, cwd=ROOT, stdout=subprocess.PIPE,
    )
    assert done.returncode == 0
    for number, (args, part) in enumerate(cases):
        lines = (tmp_path / str(number)).read_text().splitlines()
        assert len(lines) == 1, (args, lines)
        assert lines[0].startswith("error: ") and part in lines[0], (args, lines)
    printed = done.stdout.splitlines()
    assert [line for line in printed if line != "2"] == [
        "acts-seed=3", "1 cell to run, 640 activations to train on", "0",
        *(tmp_path / "table.md").read_text().splitlines(), "0",
    ]
    assert printed.count("2") == len(cases) and not (tmp_path / "new").exists()


def test_results_that_cannot_be_written_are_told(tmp_path):
    with pytest.raises(UserError, match="results.csv cannot be written"):
        sweep.write_results([], tmp_path / "absent", COMMAND)
