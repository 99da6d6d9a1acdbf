"""A run as a function: synthetic activations to a report with ground truth, and match by time."""

import dataclasses
import json
import sys
from pydoc_data.topics import topics
from threading import Event
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import write_model

import scale_sae_jax
from experiments import console
from scale_sae_jax import run as runs
from scale_sae_jax import sources as read
from scale_sae_jax import workdir
from scale_sae_jax.activations.masks import largest_evaluated
from scale_sae_jax.config import (
    ActivationsConfig,
    Config,
    EvalConfig,
    LMConfig,
    OptimConfig,
    SyntheticConfig,
    TextConfig,
    check,
)
from scale_sae_jax.console import Console
from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation.heldout import text_batches
from scale_sae_jax.lm import load_language_model
from scale_sae_jax.run import run
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.text.sources import Document
from scale_sae_jax.training import metrics
from scale_sae_jax.training.checkpoints import Checkpoints
from scale_sae_jax.training.interrupts import Interrupted
from scale_sae_jax.training.metrics import read_lines

SMALL = SyntheticConfig(
    features=40, d=16, samples=4000, heldout=500, max_rate=0.2, min_rate=0.02, roots=2, depth=1,
    factors=3,
)
CONFIG = Config(
    mesh="data:1,expert:1",
    steps=300,
    batch_size=128,
    log_every=100,
    checkpoint_every=0,
    synthetic=SMALL,
    sae=dataclasses.replace(
        preset("topk", latents=64, experts=4, active=2, k=4, match="width"), auxk_latents=8
    ),
    optim=OptimConfig(lr=3e-3),
    eval=EvalConfig(tokens=400, bootstrap=20),
)


def test_synthetic_run_reports_ground_truth_and_the_bill(tmp_path):
    results = run(CONFIG, tmp_path, Event())
    assert results == json.loads((tmp_path / "eval.json").read_text())
    assert results["fvu"] < 0.5 and results["l0"] == pytest.approx(4, abs=0.3)
    assert 0.5 < results["mcc"] <= 1 and 0 < results["f1"] <= 1 and 0 < results["uniqueness"] <= 1
    assert (results["architecture"], results["match"]) == ("topk", "width")
    assert results["active_width"] == results["total_width"] == 64
    assert results["flops_per_token"] == 2 * 16 * 64 + 2 * 16 * 4
    assert results["eval_text"] == "synthetic-40" and results["delta_ce"] is None
    lines = read_lines(tmp_path / "metrics.jsonl")
    seconds, steps = ([line[name] for line in lines] for name in ("seconds", "step"))
    assert seconds[-1] <= results["train_seconds"] < seconds[-1] + 1
    assert results["tokens_seen"] == 300 * 128
    assert results["tokens_per_second"] == 300 * 128 / results["train_seconds"]
    each = np.diff(seconds) / np.diff(steps)
    assert len(each) > 1 and results["seconds_per_step"] == pytest.approx(np.median(each))
    sae, params = scale_sae_jax.load(tmp_path)
    assert sae.latents == 64 and params["w_enc"].shape == (64, 16)


def test_parameters_kept_in_bfloat16_are_measured_in_float32(tmp_path, monkeypatch):
    measured = []

    def evaluate(sae, params, *rest, **more):
        measured.append(params)
        return evaluator(sae, params, *rest, **more)

    evaluator = runs.evaluate
    monkeypatch.setattr(runs, "evaluate", evaluate)
    narrow = dataclasses.replace(CONFIG, steps=20, optim=OptimConfig(param_dtype="bfloat16"))
    assert 0 < run(narrow, tmp_path, Event())["mcc"] <= 1
    measured.append(scale_sae_jax.load(tmp_path)[1])
    for params in measured:
        assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}
        kept = params["w_dec"].astype(jnp.bfloat16)
        np.testing.assert_array_equal(kept.astype(jnp.float32), params["w_dec"])


def test_evaluation_leaves_out_what_training_may_have_kept(tmp_path):
    write_model(tmp_path, [text[:2000] for text in topics.values()])
    lm = load_language_model(LMConfig(path=str(tmp_path), dtype="bfloat16"))
    documents = [Document(name, text[:100]) for name, text in list(topics.items())[:20]]
    everything = ActivationsConfig(
        mask_padding=False, drop_position_0=False, drop_special=False, max_norm_ratio=0.0
    )

    def scored(activations):
        config = Config(
            activations=activations, text=TextConfig(context=64), lm=LMConfig(layer=0)
        )
        batches = list(text_batches(config, lm, documents))
        assert {batch.x.dtype for batch in batches} == {jnp.dtype("float32")}
        return np.concatenate([batch.scored for batch in batches])

    np.testing.assert_array_equal(scored(everything), scored(ActivationsConfig()))
    assert not scored(everything)[:, 0].any() and scored(everything)[:, 1].any()
    assert largest_evaluated(2.0, everything) == largest_evaluated(2.0, ActivationsConfig()) == 20
    assert largest_evaluated(2.0, ActivationsConfig(max_norm_ratio=5.0)) == 10


def test_an_evaluation_of_its_own_kind_has_its_own_file_and_bill(tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_every=150, keep_checkpoints=2)
    official = run(config, tmp_path, Event())
    lines = {line["step"]: line for line in read_lines(tmp_path / "metrics.jsonl")}
    sources = read.open_sources(config, tmp_path, Event(), Console())

    def evaluated(step, **settings):
        number, newest = runs.find_step(tmp_path, step)
        assert newest == 300
        asked = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **settings))
        heldout = read.read_heldout(asked, asked.text, sources)
        measured = sources, heldout, *scale_sae_jax.load(tmp_path, number), number
        results = runs.measure_run(asked, asked.text, tmp_path, *measured)
        path = runs.write_evaluation(asked, asked.text, tmp_path, results, number == newest)
        assert json.loads(path.read_text()) == results
        return path.name, results

    assert evaluated("latest") == ("synthetic-40.json", official)
    name, early = evaluated(150)
    assert name == "synthetic-40-step-150.json" and (early["step"], official["step"]) == (150, 300)
    assert early["tokens_seen"] == 150 * 128 and early["fvu"] != official["fvu"]
    assert lines[100]["seconds"] < early["train_seconds"] < lines[200]["seconds"]
    assert early["trained_together"] == 1
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": "many", "seconds": "few"}\n')
    lost = evaluated(150)[1]
    assert lost["train_seconds"] == early["train_seconds"] and lost["seconds_per_step"] is None
    name, short = evaluated("latest", tokens=100)
    assert name.startswith("synthetic-40-eval-") and short["tokens_seen"] == 300 * 128
    assert json.loads((tmp_path / "eval.json").read_text()) == official


def test_texts_of_one_stem_have_a_file_each(tmp_path):
    config = on_text(tmp_path)
    workdir.claim(config, tmp_path)

    def path(text):
        results = {"eval_text": text.path, "step": 1}
        return runs.write_evaluation(config, text, tmp_path, results, last=True).name

    own, *others = (path(TextConfig(path=p)) for p in (config.text.path, "a/one.txt", "b/one.txt"))
    assert own == "one.json" and len({own, *others}) == 3
    assert all(name.startswith("one-") for name in others)


def test_an_evaluation_that_cannot_be_written_is_told(tmp_path):
    workdir.claim(CONFIG, tmp_path)
    (tmp_path / "evals").write_text("")
    with pytest.raises(UserError, match="cannot be written to .*synthetic-40.json: File exists"):
        results = {"eval_text": "synthetic-40", "step": 1}
        runs.write_evaluation(CONFIG, CONFIG.text, tmp_path, results, last=True)


def test_a_second_program_in_the_folder_of_a_run_is_refused(tmp_path):
    held = workdir.lock(tmp_path / ".run.lock")
    with pytest.raises(UserError, match=f"another process works in {tmp_path}"):
        run(CONFIG, tmp_path, Event())
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]
    held.release()
    run(dataclasses.replace(CONFIG, steps=2), tmp_path, Event())
    workdir.lock(tmp_path / ".run.lock").release()


def test_a_second_program_waits_for_the_store(tmp_path):
    held, told = workdir.lock(tmp_path / "store.lock"), []

    def wait(note):
        told.append(note)
        held.release()

    workdir.lock(tmp_path / "store.lock", wait).release()
    assert told == [f"waiting for another process, which holds {tmp_path / 'store.lock'}"]


def test_a_request_to_stop_ends_the_waiting_for_another_program(tmp_path):
    path, stop = tmp_path / "store.lock", Event()
    other = workdir.lock(path)
    with pytest.raises(Interrupted, match="before any work"):
        with workdir.held(path, lambda line: stop.set(), stop):
            raise AssertionError("went on without the lock")
    other.release()
    workdir.lock(path).release()  # nobody holds it


def test_a_folder_that_cannot_be_locked_is_used_all_the_same(tmp_path):
    workdir.lock(tmp_path / "absent" / "run.lock").release()
    (tmp_path / "file").write_text("")
    workdir.lock(tmp_path / "file" / "run.lock").release()


def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(tmp_path, monkeypatch):
    begun, one = [], SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    fake = SimpleNamespace(init=lambda **settings: begun.append(settings) or one)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        metrics.MetricsWriter(tmp_path, 0, {}).__exit__()
    assert begun[0] == begun[1] and begun[0]["id"] and begun[0]["resume"] == "allow"


def test_a_refusal_of_wandb_is_told(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(UserError, match="api_key not configured .no-tty.; log in with 'wandb lo"):
        run(dataclasses.replace(CONFIG, wandb=True), tmp_path / "run", Event())


def test_wandb_that_is_not_installed_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run(dataclasses.replace(CONFIG, wandb=True), tmp_path / "run", Event())
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_is_a_file_is_told(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints cannot be written: File exists"):
        Checkpoints(tmp_path / "checkpoints")


def test_a_disk_that_fills_up_under_a_checkpoint_is_told(tmp_path):
    def fail():
        raise ValueError("RESOURCE_EXHAUSTED: write failed")

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints._pending = SimpleNamespace(result=fail)
        with pytest.raises(UserError, match="cannot be written to .*: No space left on device"):
            checkpoints.latest


def test_match_by_time_is_measured_once_and_kept(tmp_path, monkeypatch):
    measured = []

    def latents(config, width, batch_size):
        measured.append((config.experts, width, batch_size))
        return 48

    monkeypatch.setattr(runs, "equal_time_latents", latents)
    sae = dataclasses.replace(CONFIG.sae, match="time")
    config = dataclasses.replace(CONFIG, sae=sae, steps=20)
    results = run(config, tmp_path, Event())
    assert results["match"] == "time" and results["total_width"] == 48
    longer = run(dataclasses.replace(config, steps=40), tmp_path, Event())
    assert measured == [(4, 16, 128)] and longer["tokens_seen"] == 40 * 128
    assert scale_sae_jax.load(tmp_path)[0].latents == 48
    (tmp_path / "matched.json").write_text('{"latents": "many"}')
    with pytest.raises(UserError, match="does not hold a number of latents"):
        scale_sae_jax.load(tmp_path)


def test_equal_time_latents_meet_the_goal_on_a_made_up_machine(monkeypatch):
    """A step of one dictionary takes 2e-6 L^0.8 s, the many-expert one 1e-3 s."""
    from scale_sae_jax.training import matching

    def seconds(config, batches):
        while True:  # each call finds the machine slower than the one before
            slower.append(1.01 * slower[-1])
            scale = config.architecture == "scale"
            yield slower[-1] * (1e-3 if scale else 2e-6 * config.latents**0.8)

    slower = [1.0]
    monkeypatch.setattr(matching, "call_seconds", seconds)
    config = preset("relu", latents=4096, experts=16, active=2, k=32, match="time")
    found = matching.equal_time_latents(config, 64, 128)
    assert found % 64 == 0 and found == pytest.approx(500**1.25, abs=33)


def test_a_step_is_timed():
    from scale_sae_jax.training.matching import step_seconds

    config = preset("topk", latents=64, experts=1, active=1, k=4)
    seconds = step_seconds(config, jnp.ones((2, 32, 16)), calls=1)
    assert np.isfinite(seconds) and seconds > 0


def test_two_sources_are_refused():
    two = dataclasses.replace(CONFIG.activations, path="acts.npy")
    with pytest.raises(UserError, match="two sources of activations"):
        check(dataclasses.replace(CONFIG, activations=two))
    with pytest.raises(UserError, match="synthetic.features = 5 must"):
        few = dataclasses.replace(SMALL, features=5)
        read.check_sources(dataclasses.replace(CONFIG, synthetic=few))


@pytest.mark.parametrize("change", [{"lm": LMConfig(path="model")}, {"text": TextConfig("a.txt")}])
def test_settings_of_a_text_beside_an_array_are_refused(change):
    array = dataclasses.replace(CONFIG.activations, path="acts.npy")
    config = dataclasses.replace(CONFIG, synthetic=SyntheticConfig(), activations=array)
    runs.check_run(dataclasses.replace(config, text=TextConfig(heldout_fraction=0.2)))
    with pytest.raises(UserError, match=f"config.{[*change][0]}.path = .* would do nothing.*acts"):
        runs.check_run(dataclasses.replace(config, **change))


@pytest.mark.parametrize("match", ["active", "time"])
def test_experts_are_not_matched(tmp_path, match):
    sae = preset("paper", latents=64, experts=4, active=2, k=4)
    config = dataclasses.replace(CONFIG, sae=dataclasses.replace(sae, match=match))
    with pytest.raises(UserError, match="has experts: leave match empty"):
        run(config, tmp_path / "run", Event())
    assert not (tmp_path / "run").exists()


def test_fewer_activations_than_a_batch_are_refused_before_training(tmp_path):
    few = dataclasses.replace(SMALL, samples=100)
    with pytest.raises(UserError, match="gives 100 activations .* config.batch_size = 128"):
        run(dataclasses.replace(CONFIG, synthetic=few), tmp_path, Event())
    assert not (tmp_path / "checkpoints").exists()


def test_an_undefined_result_is_null_in_json(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.pca, "fvu", lambda *_: float("nan"))
    assert run(dataclasses.replace(CONFIG, steps=2), tmp_path, Event())["fvu_pca"] is None
    assert '"fvu_pca": null' in (tmp_path / "eval.json").read_text()


class Told(Console):
    """Keeps what it is told."""

    def __init__(self):
        self.notes, self.seen = [], []

    def note(self, text):
        self.notes.append(text)

    def progress(self, what, done, total):
        self.seen.append((done, total))


@pytest.mark.parametrize(("asked", "notes"), [(500, 0), (501, 1), (64, 0)])
def test_progress_over_heldout_samples_begins_at_0_and_ends_at_all(asked, notes):
    sources = read.Sources(*read.open_synthetic(SMALL), None)
    config = dataclasses.replace(CONFIG, eval=EvalConfig(tokens=asked))
    told, there = Told(), min(asked, SMALL.heldout)
    assert read.read_heldout(config, config.text, sources, told).tokens == there
    assert told.seen[0] == (0, asked) and told.seen[-1] == (there, there)
    assert len(told.notes) == notes and all("500 held-out tokens" in note for note in told.notes)


def test_the_rate_of_a_resumed_run_counts_what_it_did_itself():
    bars = console.Bars()
    record = {"loss": 1.0, "fvu": 0.5, "l0": 4.0, "dead": 0.0, "tokens_per_second": 1.0}
    bars.step(record | {"step": 900}, 1000)
    bars.step(record | {"step": 910}, 1000)
    shown = bars._bar.format_dict
    bars.close()
    assert (shown["initial"], shown["n"], shown["total"]) == (900, 910, 1000)


def on_text(folder, **settings):
    """CONFIG on a text of one document, which is not held out at the fraction by default."""
    (folder / "one.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    text = TextConfig(path=f"{folder}/one.jsonl", **settings)
    return dataclasses.replace(
        CONFIG, synthetic=SyntheticConfig(), lm=LMConfig(path="model"), text=text
    )


def test_a_text_that_holds_out_nothing_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "check_sources", lambda config: None)
    runs.check_run(on_text(tmp_path, heldout_fraction=0.999))
    runs.check_run(on_text(tmp_path, heldout_path=f"{tmp_path}/one.jsonl"))
    with pytest.raises(UserError, match="heldout_fraction = 0.001 of .* holds out no document"):
        runs.check_run(on_text(tmp_path, heldout_fraction=0.001))


def test_a_trained_run_whose_store_is_gone_is_told_so_before_it_is_harvested_again(
    tmp_path, monkeypatch
):
    config = on_text(tmp_path)
    config = dataclasses.replace(config, activations=ActivationsConfig(path="stores/a"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(read, "load_language_model", lambda config: None)
    noted, console = [], Console()
    monkeypatch.setattr(Console, "note", lambda self, text: noted.append(text))

    def harvest(*_):
        noted.append("harvest")
        raise UserError("seen enough")

    monkeypatch.setattr(read, "harvest", harvest)
    for trained in (False, True):
        if trained:
            (tmp_path / "checkpoints").mkdir()
        with pytest.raises(UserError, match="seen enough"):
            read.open_sources(config, tmp_path, Event(), console)
    assert noted[0] == noted[2] == "harvest" and len(noted) == 3
    assert noted[1].startswith("stores/a holds no complete store (relative to /")


@pytest.mark.parametrize(
    ("skipped", "reason"), [(2, "was trained on 2 of its documents"), (0, "it has no document")]
)
def test_why_no_token_is_left_to_evaluate_on(tmp_path, monkeypatch, skipped, reason):
    def nothing(config, text, sources, on_skip):
        for _ in range(skipped):
            on_skip("document")
        return iter(())

    monkeypatch.setattr(read, "heldout_text", nothing)
    train, lm = (object.__new__(kind) for kind in (read.ActivationArray, read.LanguageModel))
    config, sources = on_text(tmp_path), read.Sources(train, None, lm)
    with pytest.raises(UserError, match=f"one.jsonl leaves no held-out token: .*{reason}"):
        read.read_heldout(config, config.text, sources)
