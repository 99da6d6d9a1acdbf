"""Sweeps to reports: the numbers behind the figures, and the files of a miniature."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.report import tables
from scale_sae_jax.report.arms import apart, arms_of, number_axes
from scale_sae_jax.report.page import Table, html, markdown

figures = pytest.importorskip("scale_sae_jax.report.figures", reason="needs matplotlib")

ROOT = Path(__file__).parent.parent
ROWS = [
    {"preset": name, "k": k, "seed": seed, "fvu": fvu + 0.01 * seed, "flops_per_token": 10 * k}
    for name, fvu in (("a", 0.2), ("b", 0.3)) for k in (4, 8) for seed in (0, 1, 2)
]
AXES = ["preset", "k", "seed"]
NUMBERS = [float(n) for n in range(10)]


def test_arms_and_their_intervals():
    arms = arms_of(ROWS, apart(AXES))
    assert [arm.name for arm in arms] == ["a k=4", "a k=8", "b k=4", "b k=8"]
    found = arms[0].interval("fvu")
    low, high = stats.t.interval(0.95, 2, found.mean, stats.sem([0.2, 0.21, 0.22]))
    assert found.mean == pytest.approx(0.21) and found.half == pytest.approx((high - low) / 2)
    assert arms[0].interval("delta_ce") is None
    assert np.isnan(arms_of(ROWS[:1], ["preset"])[0].interval("fvu").half)
    assert number_axes(ROWS, AXES) == ["k"] and number_axes(ROWS[:3], AXES) == []
    assert [arm.name for arm in arms_of(ROWS, apart(AXES, "k"))] == ["a", "b"]


@given(st.lists(st.tuples(*[st.sampled_from(NUMBERS)] * 2), min_size=1, max_size=20))
def test_pareto_front_is_what_nothing_beats(points):
    front = figures.pareto_front(points)
    assert set(front) == {
        p for p in points
        if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)
    }


def test_similarity_of_experts_by_hand(monkeypatch):
    monkeypatch.setattr(figures, "BLOCK", 5)  # of 12
    rng = np.random.default_rng(0)
    decoder = rng.normal(size=(3, 4, 5))
    decoder[2, 1] = 2 * decoder[0, 3]  # a twin in another expert
    unit = decoder / np.linalg.norm(decoder, axis=-1, keepdims=True)
    expected = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            for a in range(4):
                cosines = [unit[i, a] @ unit[j, b] for b in range(4) if (i, a) != (j, b)]
                expected[i, j] += max(cosines) / 4
    np.testing.assert_allclose(figures.expert_similarity(decoder), expected, rtol=1e-6)


def test_figures_show_arms_and_leave_out_what_is_not_there():
    arms = arms_of(ROWS, apart(AXES))
    quality = figures.quality(arms)
    assert [t.get_text() for t in quality.axes[0].get_yticklabels()] == [
        "b k=4", "b k=8", "a k=4", "a k=8"  # the best on top
    ]
    curve = figures.along(ROWS, AXES, "k")
    assert [t.get_text() for t in curve.axes[0].get_legend().get_texts()] == ["a", "b"]
    lines = [line for line in curve.axes[0].get_lines() if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(np.array(lines[0].get_ydata(), float), [0.21, 0.21])
    assert figures.pareto(arms) is not None
    assert figures.redundancy(arms) is None and figures.specialisation(arms) is None
    assert figures.omega({}) is None
    void = arms_of([row | {"other_fvu": None} for row in ROWS], apart(AXES))
    assert figures.generalisation(void) is None
    rows = [row | {"other_fvu": 0.5 if row["preset"] == "a" else None} for row in ROWS]
    (axes,) = figures.generalisation(arms_of(rows, apart(AXES))).axes
    assert [len(line.get_xdata()) for line in axes.get_lines()[::3]] == [4, 2]
    texts = {f"{name}_fvu": 0.5 for name in "abcdefghi"}
    (axes,) = figures.generalisation(arms_of([row | texts for row in ROWS], apart(AXES))).axes
    assert points_of(axes) == 10 * [4]
    assert figures.along(ROWS[:3], AXES, "k") is None and figures.similarity({}) is None


def points_of(axes):
    """The points of each curve of some axes, also of empty ones."""
    return [len(bars.lines[0].get_xdata()) for bars in axes.containers]


def test_a_curve_that_lacks_a_result_leaves_the_others_in_place():
    rows = [row | {"recovered": 0.9 if row["preset"] == "a" else None} for row in ROWS]
    fvu, recovered = figures.along(rows, AXES, "k").axes
    assert points_of(fvu) == [2, 2] and points_of(recovered) == [2, 0]
    rows = [row | {"fvu": None if row["preset"] == "a" else row["fvu"]} for row in rows]
    curve = figures.along(rows, AXES, "k")
    assert [points_of(axes) for axes in curve.axes] == [[0, 2], [2, 0]]
    assert [t.get_text() for t in curve.axes[0].get_legend().get_texts()] == ["a", "b"]


def test_an_arm_without_fvu_stands_in_no_figure_of_it():
    rows = [{"preset": "a", "fvu": None, "flops_per_token": 5.0}, {"preset": "b", "fvu": 0.5}]
    assert figures.pareto(arms_of(rows, ["preset"])) is None  # costs and FVU of no arm
    rows[1] |= {"train_seconds": 3.0}
    (axes,) = figures.pareto(arms_of(rows, ["preset"])).axes
    assert "training" in axes.get_xlabel() and points_of(axes) == [1]
    rows = [{"preset": "a", "fvu": None, "other_fvu": 0.5}]
    (axes,) = figures.generalisation(arms_of(rows, ["preset"])).axes
    assert points_of(axes) == [0, 1]


def test_the_table_of_cells_shows_that_fvu_is_not_defined():
    rows = [{"preset": "a", "seed": 0, "fvu": None, "command": "x"}]
    assert tables(rows, ["preset", "seed"])[1].rows == [["a", "0", "-", "x"]]


def test_a_row_an_arm_and_a_mark_for_each_part():
    rows = [row | {"load_cv": 0.3, "expert_mi": 2.0 + row["seed"], "expert_mi_null": 0.5}
            for row in ROWS]
    arms = arms_of([*rows, {"preset": "plain", "load_cv": 0.0}], ["preset"])
    figure = figures.specialisation(arms)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b"]
    marks = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 2]
    values = {tuple(map(float, line.get_xdata())) for line in marks}
    assert {(3.0, 3.0), (0.5, 0.5)} <= values
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["measured", "shuffled tokens"]
    without_text = arms_of([{"preset": "a", "load_cv": 0.3}], ["preset"])
    (axes,) = figures.specialisation(without_text).axes  # no panel for what was not measured
    assert axes.get_xlabel() == "CV of load" and points_of(axes) == [1]


def test_likeness_is_shown_beside_that_of_random_directions_in_the_same_scope():
    cosines = {"_intra": 0.25, "_intra_null": 0.26, "_inter": 0.31, "_inter_null": 0.3, "": 0.33,
               "_null": 0.34}
    row = {"preset": "a"} | {f"max_cosine_mean{part}": value for part, value in cosines.items()}
    (axes,) = figures.redundancy(arms_of([row], ["preset"])).axes
    shown = {bars.get_label(): float(bars.lines[0].get_xdata()[0]) for bars in axes.containers}
    assert shown == {"same expert": 0.25, "same expert, random": 0.26, "another expert": 0.31,
                     "another expert, random": 0.3}


def test_time_that_cells_share_has_no_interval_over_seeds():
    rows = [{"seed": s, "train_seconds": 3.0, "fvu": s, "trained_together": 3} for s in range(3)]
    (arm,) = arms_of(rows, [])
    assert np.isnan(arm.interval("train_seconds").half) and arm.interval("fvu").half > 0
    (alone,) = arms_of([row | {"trained_together": 1} for row in rows], [])
    assert alone.interval("train_seconds").half == 0


def test_pages_escape_what_they_are_given():
    evil = "<img src=x onerror=alert(1)>|"
    table = Table(evil, ["name", "command"], [[evil, evil]], commands="command")
    page = html(evil, evil, [], [table], Path("."))
    assert "<img" not in page and page.count("&lt;img src=x") == 6
    assert "alert(1)>\\|" in markdown("t", "l", [], [table])


GRID = '''
from scale_sae_jax.config import Config, EvalConfig, OptimConfig, SAEConfig, SyntheticConfig
from scale_sae_jax.config import to_config_dict
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.sweep import axis, cell, product
import dataclasses

WORLD = SyntheticConfig(features=40, d=16, samples=4000, heldout=512, max_rate=0.2, min_rate=0.02,
                        roots=2, depth=1, factors=3)

def get_grid(arg=""):
    cells = []
    presets = axis("preset", ("paper", "plain"))
    for axes in product(presets, axis("k", (2, 4)), axis("seed", (0, 1))):
        sae = preset(axes["preset"], latents=64, experts=4, active=2, k=axes["k"])
        config = Config(seed=axes["seed"], steps=40, batch_size=64, log_every=20,
                        synthetic=WORLD, sae=dataclasses.replace(sae, auxk=False),
                        optim=OptimConfig(lr=3e-3), eval=EvalConfig(tokens=256, bootstrap=20))
        cells.append(cell(axes, to_config_dict(config)))
    return cells
'''
TIMED = {"train_seconds", "tokens_per_second", "seconds_per_step"}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs a command of experiments on the miniature grid."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "mini.py").write_text(GRID)
    env = os.environ | {"JAX_PLATFORMS": "cpu"}

    def start(name, workdir, *flags):
        grid = [f"--grid={folder}/mini.py", "--together=4"] if name == "sweep" else []
        return subprocess.Popen(
            [sys.executable, "-m", f"experiments.{name}", *grid, f"--workdir={workdir}", *flags],
            cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )

    return start


def finish(process):
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0 and "Traceback" not in err, err
    return out


def results(workdir):
    rows = pyarrow.parquet.read_table(workdir / "results.parquet").to_pylist()
    return [
        {n: v for n, v in row.items() if n not in TIMED | {"command"}} for row in rows
    ]


def test_a_killed_sweep_ends_as_a_whole_one_and_its_report_has_every_cell(command, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(command("sweep", whole))
    killed = command("sweep", cut)
    until = time.monotonic() + 200
    while not (cut / "plain-k=2-seed=0" / "metrics.jsonl").exists():
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    finish(command("sweep", cut))
    assert results(cut) == results(whole)
    assert [row["trained_together"] for row in results(whole)] == 8 * [4]

    out = finish(command("report", whole))
    folder = whole / "report"
    assert out.strip() == f"{folder}/index.html"
    names = {"quality", "pareto", "redundancy", "expert_load", "omega", "similarity",
             "specialisation", "along_k"}
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text()
    page, text = (folder / "index.html").read_text(), (folder / "report.md").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r'(src|href)="(?!data:)', page)
    for row in results(whole):
        line = f"| {row['preset']} | {row['k']} | {row['seed']} | {row['fvu']:.4f} |"
        assert line in text
        assert f"--filter={row['folder']}" in page
    record = json.loads((whole / "paper-k=4-seed=1" / "cell.json").read_text())
    assert record["results"]["l0"] == pytest.approx(4, abs=0.5)


def test_a_report_without_results_is_refused(command, tmp_path):
    process = command("report", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "has no results.parquet" in err and "Traceback" not in err
