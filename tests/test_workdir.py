"""The folder of a run: settings, records, checkpoints, and loading what was trained."""

import dataclasses
import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scale_sae_jax
from scale_sae_jax import workdir as folders
from scale_sae_jax.config import Config, LMConfig, SAEConfig, TextConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.results import RESULTS
from scale_sae_jax.sae import build
from scale_sae_jax.training import metrics, state
from scale_sae_jax.training.checkpoints import Checkpoints
from scale_sae_jax.training.optim import optimiser

WIDTH = 6
CONFIG = Config(
    lm=LMConfig(path="model"),
    text=TextConfig(path="text.jsonl"),
    sae=SAEConfig(latents=8, experts=2, active=1, k=2),
    keep_checkpoints=2,
)
PARTS = (
    build(CONFIG.sae, WIDTH),
    optimiser(CONFIG.optim, CONFIG.sae.latents, CONFIG.steps, CONFIG.sae.decoder_norm),
    CONFIG.optim,
)


def state_at(step, fvu):
    """A state whose b_dec tells its step."""
    start = state.create(*PARTS, 0)
    params = start.params | {"b_dec": jnp.full(WIDTH, float(step))}
    return start._replace(step=jnp.asarray(step, jnp.int32), fvu=jnp.float32(fvu), params=params)


def save(folder, fvu_at):
    with Checkpoints(folder / "checkpoints", CONFIG.keep_checkpoints) as checkpoints:
        for step, fvu in fvu_at.items():
            checkpoints.save(state_at(step, fvu), 10.0 * step)


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 2 (the best), 4 and 5."""
    folders.claim(CONFIG, tmp_path)
    save(tmp_path, {1: 0.5, 2: 0.2, 3: 0.6, 4: 0.7, 5: 0.4})
    return tmp_path


def begin(folder):
    """What a run has written as it starts to train."""
    folders.claim(CONFIG, folder)
    (folder / "metrics.jsonl").write_text("")


@pytest.fixture
def failing_reads():
    """Orbax leaves the errors of all reads but the first unretrieved; they end with the test."""
    yield
    gc.collect()


IGNORE_THEM = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def refusal(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# config.json


def test_claim_writes_the_settings_and_reads_them_back(tmp_path):
    folder = tmp_path / "runs" / "new"
    assert folders.claim(CONFIG, folder) == []
    assert folders.read_config(folder) == CONFIG
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert folders.claim(CONFIG, folder) == []


@pytest.mark.parametrize(
    ("change", "remarks"),
    [
        ({"log_every": 7, "checkpoint_every": 1, "keep_checkpoints": 9, "wandb": True}, []),
        ({"mesh": "data:1,expert:1", "steps_per_call": 1}, []),
        ({"eval": dataclasses.replace(CONFIG.eval, tokens=1)}, []),
        ({"steps": 20_000}, ["config.steps changed from 10000 to 20000"]),
        (
            {"optim": dataclasses.replace(CONFIG.optim, lr=0.5)},
            ["config.optim.lr changed from 0.0 to 0.5"],
        ),
    ],
)
def test_claim_allows_what_leaves_the_next_step_alone_and_remarks_on_the_rest(
    tmp_path, change, remarks
):
    begin(tmp_path)
    changed = dataclasses.replace(CONFIG, **change)
    found = folders.claim(changed, tmp_path)
    assert len(found) == len(remarks)
    assert all(text.startswith(remark) for text, remark in zip(found, remarks, strict=True))
    assert folders.read_config(tmp_path) == changed


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        (None, "seed", 1),
        (None, "batch_size", 64),
        ("sae", "k", 1),
        ("lm", "layer", 3),
        ("text", "context", 64),
        ("optim", "b1", 0.5),
        ("activations", "dtype", "float32"),
    ],
)
def test_claim_refuses_another_run_and_leaves_the_folder_as_it_was(tmp_path, section, name, value):
    begin(tmp_path)
    change = {name: value}
    if section:
        change = {section: dataclasses.replace(getattr(CONFIG, section), **change)}
    message = refusal(lambda: folders.claim(dataclasses.replace(CONFIG, **change), tmp_path))
    setting = f"config.{section}.{name}" if section else f"config.{name}"
    assert setting in message and repr(value) in message and "--workdir" in message
    assert folders.read_config(tmp_path) == CONFIG


@pytest.mark.parametrize(
    ("steps", "change", "part"),
    [
        (5, {"optim": dataclasses.replace(CONFIG.optim, lr=0.5)}, "config.optim.lr = 0.0, so 0.5"),
        (5, {"steps": 4}, "more than config.steps = 4"),
        (9, {"steps": 4}, "has taken 5 steps"),
    ],
)
def test_claim_refuses_what_comes_too_late(tmp_path, steps, change, part):
    config = dataclasses.replace(CONFIG, steps=steps)
    folders.claim(config, tmp_path)
    for step in ("2", "5", "9.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    late = dataclasses.replace(config, **change)
    assert part in refusal(lambda: folders.claim(late, tmp_path))
    assert folders.read_config(tmp_path) == config
    longer = dataclasses.replace(config, steps=10, optim=dataclasses.replace(config.optim, lr=0.5))
    assert len(folders.claim(longer, tmp_path)) == 2
    assert folders.read_config(tmp_path) == longer


def test_a_run_may_end_at_the_step_it_has_come_to(tmp_path):
    """No step is left for another schedule."""
    folders.claim(dataclasses.replace(CONFIG, steps=9), tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert folders.claim(dataclasses.replace(CONFIG, steps=5), tmp_path) == []


def test_settings_may_be_corrected_before_the_run_has_begun(tmp_path):
    folders.claim(CONFIG, tmp_path)
    corrected = dataclasses.replace(CONFIG, seed=1)
    assert folders.claim(corrected, tmp_path) == []
    assert folders.read_config(tmp_path) == corrected


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(lambda: folders.claim(CONFIG, tmp_path / "file" / "run"))
    assert "cannot write" in message and "--workdir" in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"seed": 0', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "JSON object"),
        (b'{"seed": "x"}', "config.seed"),
        (b'{"sead": 0}', "config.sead"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, content, part):
    begin(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    for action in (
        lambda: folders.read_config(tmp_path),
        lambda: folders.claim(CONFIG, tmp_path),
        lambda: scale_sae_jax.load(tmp_path),
    ):
        assert part in refusal(action)
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_config_that_is_no_runs_is_not_overwritten(tmp_path):
    path = tmp_path / "config.json"
    for content in ('{"model_type": "gpt2", "n_layer": 12}', "notes"):
        path.write_text(content)
        assert str(path) in refusal(lambda: folders.claim(CONFIG, tmp_path))
        assert path.read_text() == content


def test_the_folder_of_a_sweep_is_not_that_of_a_run(tmp_path):
    (tmp_path / RESULTS).touch()
    message = refusal(lambda: folders.claim(CONFIG, tmp_path))
    assert f"{tmp_path} is the folder of a sweep" in message
    folders.claim(CONFIG, tmp_path / "cell")


# metrics.jsonl


def test_keep_until_drops_later_and_damaged_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.keep_until(path, 3) == [] and path.read_text() == ""
    lines = [{"step": step, "loss": step / 2} for step in (1, 2, 4, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "los')
    assert metrics.read_lines(path) == lines
    assert metrics.keep_until(path, 4) == lines[:3]
    assert metrics.read_lines(path) == lines[:3] and path.read_text().endswith("\n")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("bad", [b"5", b"{}", b'{"step": "1"}', b"[" * 100_000, b"\xff"])
def test_a_line_that_is_no_record_is_left_out(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n')
    kept = [{"step": 1}, {"step": 2}]
    assert metrics.keep_until(path, 3) == kept == metrics.read_lines(path)


def test_writer_appends_complete_lines_at_once(tmp_path):
    with metrics.MetricsWriter(tmp_path, 0, None) as writer:
        writer.write({"step": 1, "loss": 0.5})
        writer.write({"step": 2, "loss": 0.25})
        found = metrics.read_lines(tmp_path / "metrics.jsonl")  # before it is closed
    assert found == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_records_that_cannot_be_written_are_told(tmp_path):
    message = refusal(lambda: metrics.MetricsWriter(tmp_path / "absent", 0, None))
    assert "absent: No such file" in message
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")

    def write():
        with metrics.MetricsWriter(tmp_path, 0, None) as writer:
            writer.write({"step": 1})

    message = refusal(write)
    assert f"{tmp_path}: No space left on device; make room, then the same command" in message


# Checkpoints


def test_the_last_and_the_best_checkpoints_are_kept(run):
    with Checkpoints(run / "checkpoints", 2) as checkpoints:
        assert checkpoints.steps == [2, 4, 5]
        assert (checkpoints.latest, checkpoints.best) == (5, 2)
        assert checkpoints.width(4) == WIDTH
        assert [checkpoints.seconds(step) for step in (2, 5)] == [20, 50]


@IGNORE_THEM
def test_load_reads_the_parameters_alone(run, failing_reads):
    """Whatever else lies beside them, damaged or of another version, which training refuses."""
    other = state_at(7, 0.1)._replace(opt_state={"moments": jnp.zeros(3)}, key=jnp.zeros(5))
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(other, 70.0)
        assert checkpoints.latest == 7
        refusal(lambda: checkpoints.restore(7, state.abstract(*PARTS)))
        older = {"step": other.step, "params": other.params}
        checkpoints._orbax.save(8, older, force=True, metrics={"fvu": 0.1})
        message = refusal(lambda: checkpoints.restore(8, state.abstract(*PARTS)))
        assert "checkpoint 8" in message and "another version's: train anew in" in message
        assert checkpoints.seconds(8) is None
    for step in (7, 8):
        _, params = scale_sae_jax.load(run, step)
        assert params.keys() == other.params.keys()
        for name, value in other.params.items():
            np.testing.assert_array_equal(params[name], value)


def test_a_restored_state_is_the_saved_one(run):
    with Checkpoints(run / "checkpoints") as checkpoints:
        restored = checkpoints.restore(4, state.abstract(*PARTS))
    expected = state_at(4, 0.7)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_an_unfinished_write_is_no_checkpoint(run):
    (run / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.latest == 5


@pytest.mark.parametrize(("step", "expected"), [("latest", 5), ("best", 2), (4, 4)])
def test_load_takes_a_step_the_latest_or_the_best(run, step, expected):
    sae, params = scale_sae_jax.load(run, step)
    assert (sae.width, sae.latents, sae.config) == (WIDTH, 8, CONFIG.sae)
    np.testing.assert_array_equal(params["b_dec"], np.full(WIDTH, expected))
    assert sae.reconstruct(params, np.zeros((3, WIDTH), np.float32)).shape == (3, WIDTH)


def test_load_names_what_is_not_there(run, tmp_path_factory, monkeypatch):
    for step in (3, "newest"):
        message = refusal(lambda step=step: scale_sae_jax.load(run, step))
        assert str(step) in message and "2, 4, 5" in message
    empty = tmp_path_factory.mktemp("empty")
    assert "holds no autoencoder" in refusal(lambda: scale_sae_jax.load(empty))
    assert "is no folder" in refusal(lambda: scale_sae_jax.load(empty / "absent"))
    monkeypatch.chdir(empty)
    assert refusal(lambda: scale_sae_jax.load("")).startswith(". holds no autoencoder")
    folders.claim(CONFIG, empty)
    assert "no checkpoints" in refusal(lambda: scale_sae_jax.load(empty))
    (empty / "checkpoints").mkdir()
    assert "no complete checkpoint" in refusal(lambda: scale_sae_jax.load(empty))


@IGNORE_THEM
def test_load_refuses_a_checkpoint_of_other_sizes(run, failing_reads):
    sae = dataclasses.replace(CONFIG.sae, latents=16)
    folders.write_json(run / "config.json", dataclasses.asdict(CONFIG) | {"sae": vars(sae)})
    assert "checkpoint 5" in refusal(lambda: scale_sae_jax.load(run))


@IGNORE_THEM
@pytest.mark.parametrize("pattern", ["state/_METADATA", "state/*ocdbt*", "state/**/d/*"])
def test_load_refuses_a_damaged_checkpoint(run, pattern, failing_reads):
    damaged = [p for p in (run / "checkpoints" / "5").glob(pattern) if p.is_file()]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refusal(lambda: scale_sae_jax.load(run))
    assert "checkpoint 5" in message and "NoneType" not in message
    assert f"delete {run}/checkpoints/5 to" in message
    assert scale_sae_jax.load(run, 4)[1]["b_dec"][0] == 4


def test_a_checkpoint_without_its_description_is_damaged(run):
    for path in (run / "checkpoints" / "5" / "state").iterdir():
        if path.is_file():
            path.write_bytes(b"")
    assert "its files are damaged; delete" in refusal(lambda: scale_sae_jax.load(run))


def test_a_damaged_measure_is_told(run):
    path = run / "checkpoints" / "5" / "metrics" / "metrics"
    path.write_text(path.read_text()[:-2])
    message = refusal(lambda: scale_sae_jax.load(run))
    assert f"{run}/checkpoints holds a damaged checkpoint" in message and "newest step" in message
