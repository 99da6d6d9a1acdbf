"""The code of the documents runs as it stands, on a small run in the place of the quickstart's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import train_small

import scale_sae_jax
from scale_sae_jax.parallel.experts import on_mesh
from scale_sae_jax.parallel.mesh import make_mesh
from scale_sae_jax.sae import registry
from scale_sae_jax.sweep import read_grid

ROOT = Path(__file__).parent.parent


def blocks(name, language):
    text = (ROOT / "docs" / name).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("run"))


def run(name, workdir=None):
    """The names that the Python of a document leaves behind."""
    names = {}
    for block in blocks(name, "python"):
        exec(compile(block.replace("runs/quickstart", str(workdir)), name, "exec"), names)
    return names


def test_tutorial(workdir, capsys):
    names = run("tutorial.md", workdir)
    printed = capsys.readouterr().out
    assert "'<|endoftext|>'" in printed and len(blocks("tutorial.md", "python")) == 6
    assert names["findings"].contexts.tokens > 50 and names["country"]
    assert not names["seen"].kept[0] and names["seen"].kept[1:].all()


def test_a_run_that_is_attached_knows_outliers_without_its_store(workdir):
    largest = scale_sae_jax.attach_run(workdir).max_norm
    (workdir / "activations").rename(workdir / "elsewhere")
    try:
        assert scale_sae_jax.attach_run(workdir).max_norm == largest < np.inf
    finally:
        (workdir / "elsewhere").rename(workdir / "activations")


def test_commands_of_the_tutorial(workdir):
    (command,) = blocks("tutorial.md", "sh")
    words = shlex.split(command.replace("runs/quickstart", str(workdir)))
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *words[1:], "--tokens=500"], cwd=ROOT, env=env,
                          text=True, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (workdir / "dashboard" / "index.html").exists()


def test_extending(monkeypatch):
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))
    names = run("extending.md")
    sae, params, x = (names[name] for name in ("sae", "params", "x"))
    unit, w_dec, b_dec = (np.asarray(params[name]) for name in ("scale", "w_dec", "b_dec"))
    acts = np.maximum((x - b_dec) / unit @ params["w_enc"].T + params["b_enc"], 0)
    error = np.square(x - b_dec - unit * acts @ w_dec).sum(-1).mean()
    expected = error + sae.config.penalty * acts.sum(-1).mean() * unit**2
    assert names["value"] == pytest.approx(expected, rel=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(names["gradient"]))
    np.testing.assert_allclose(sae.encode(params, x).values, acts * unit, rtol=1e-4, atol=1e-5)
    sharded = on_mesh(sae, make_mesh("data:8", 1))
    value, gradient = jax.jit(jax.value_and_grad(lambda p: sharded.loss(p, x, None).total))(params)
    assert float(value) == pytest.approx(float(names["value"]), rel=1e-5)
    for ours, alone in zip(*map(jax.tree.leaves, (gradient, names["gradient"])), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        sharded.loss(params, x, None).firing, sae.loss(params, x, None).firing
    )


def test_a_config_and_a_grid_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, grid = blocks("configs.md", "python")
    names = {}
    exec(compile(config, "configs.md", "exec"), names)
    assert names["get_config"]("l0=16").lm.layer == 10
    path = tmp_path / "my_grid.py"
    path.write_text(grid)
    cells = read_grid(f"{path}:")
    assert len(cells) == 6 and {cell.config.sae.k for cell in cells} == {16, 32}


PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_files_and_documents_that_are_named_exist(name):
    text = (ROOT / "docs" / name).read_text()
    for file in re.findall(r"`([a-z_]+(?:/[a-z_]+)+\.py)`", text):
        assert (ROOT / "scale_sae_jax" / file).is_file() or (ROOT / file).is_file(), file
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / "docs" / link).is_file(), link


def test_every_page_is_in_the_index_and_the_site():
    index, site = (ROOT / "docs" / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    assert PAGES == sorted({"index.md", *re.findall(r"\]\(([a-z]+\.md)\)", index)})
    assert set(PAGES) <= set(re.findall(r"[a-z/_]+\.md", site))
