"""A whole run, one street: check, harvest, train, evaluate. Commands and scripts call these."""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from filelock import FileLock
from jax.sharding import Mesh

from scale_sae_jax import workdir as folders
from scale_sae_jax.activations.array import ActivationArray, open_array
from scale_sae_jax.activations.harvest import harvest
from scale_sae_jax.activations.masks import evaluated, largest_evaluated
from scale_sae_jax.activations.store import ActivationStore, is_complete, open_store, verify
from scale_sae_jax.activations.stream import ActivationStream
from scale_sae_jax.activations.synthetic import (
    SyntheticActivations,
    check_synthetic,
    open_synthetic,
)
from scale_sae_jax.config import Config, TextConfig, digest
from scale_sae_jax.errors import UserError, telling
from scale_sae_jax.evaluation import pca
from scale_sae_jax.evaluation.evaluator import EvalBatch, evaluate, json_value, with_ablations
from scale_sae_jax.evaluation.ground_truth import measure_ground_truth
from scale_sae_jax.evaluation.heldout import array_batches, text_batches
from scale_sae_jax.lm import LanguageModel, inspect_language_model, load_language_model
from scale_sae_jax.parallel import processes
from scale_sae_jax.parallel.experts import on_mesh
from scale_sae_jax.parallel.mesh import mesh_of_run
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.registry import build, has_experts
from scale_sae_jax.text.sources import Document, check_text
from scale_sae_jax.text.splits import heldout_documents
from scale_sae_jax.training import metrics, precision, state
from scale_sae_jax.training.checkpoints import Checkpoints
from scale_sae_jax.training.interrupts import Interrupted
from scale_sae_jax.training.loop import train
from scale_sae_jax.training.matching import equal_time_latents
from scale_sae_jax.training.optim import optimiser

PCA_ROWS = 65_536


@dataclass(frozen=True)
class Sources:
    """Where activations come from: a language model and what it fills, or parts of one source."""

    train: ActivationStore | ActivationStream | ActivationArray | SyntheticActivations
    heldout: ActivationArray | SyntheticActivations | None
    lm: LanguageModel | None


@dataclass(frozen=True)
class Heldout:
    """What an autoencoder is measured on; `skipped` counts documents left out as trained on."""

    batches: list[EvalBatch]
    tokens: int  # not padding
    skipped: int


class Console:
    """What a run tells the person who started it. This one says nothing."""

    def note(self, text: str) -> None:
        """A remark in one line."""

    def progress(self, what: str, done: int, total: int) -> None:
        """How far `what` has come."""

    def step(self, record: dict[str, Any], total: int) -> None:
        """A training record."""

    def close(self) -> None:
        """Nothing more comes for now."""


def check_sources(config: Config) -> None:
    """Refuses, before any work, what the model, text or array at hand does not allow."""
    if config.synthetic.features:
        check_synthetic(config.synthetic)
        return
    if config.activations.is_array:
        return
    model = inspect_language_model(config.lm)
    if config.text.context > model.max_context:
        raise UserError(
            f"config.text.context = {config.text.context} exceeds the {model.max_context} "
            f"positions of {config.lm.path}: lower it"
        )
    check_text(config.text)


def check_run(config: Config) -> None:
    """`check_sources`, and what the architecture, the devices or the text to hold out forbid."""
    _refuse_unread(config)
    check_sources(config)
    if config.wandb:
        processes.lead_alone(metrics.import_wandb)
    mesh_of_run(config, _experts(config))
    if config.synthetic.features or config.activations.is_array:
        return
    text, trained = config.text, np.empty(0, np.uint64)
    if next(heldout_documents(text, trained, same_text=True), None) is None:
        how = f"heldout_path = '{text.heldout_path}'" if text.heldout_path else (
            f"heldout_fraction = {text.heldout_fraction} of config.text.path = '{text.path}'"
        )
        raise UserError(
            f"config.text.{how} holds out no document to evaluate on: give more text, or name some "
            "with --config.text.heldout_path=FILE.jsonl"
        )


def _refuse_unread(config: Config) -> None:
    """Refuses settings of a model and a text beside an array, which needs neither."""
    if not config.activations.is_array:
        return
    for section in ("lm", "text"):
        given = dataclasses.asdict(getattr(config, section))
        default = dataclasses.asdict(getattr(Config(), section))
        for name, value in given.items():
            if value != default[name] and name != "heldout_fraction":
                raise UserError(
                    f"config.{section}.{name} = {value!r} would do nothing: config.activations.path"
                    f" = '{config.activations.path}' is an array of activations; leave one out, "
                    f"or train with configs/array.py:path={config.activations.path}"
                )


def check_rows(config: Config, sources: Sources) -> None:
    """Refuses sources with fewer activations than a batch. Raises UserError."""
    n = sources.train.n
    if n < config.batch_size:
        raise UserError(
            f"{_name_of_data(config, config.text)} gives {n} activations to train on, fewer than "
            f"config.batch_size = {config.batch_size}: give more, or lower it"
        )


def open_sources(config: Config, workdir: Path, stop: Event, console: Console) -> Sources:
    """The activations to train on, harvested now if the store is not complete.

    A store that was complete before is read whole and compared with its checksums, unless the run
    in `workdir` has a checkpoint: it was compared then. Raises UserError if it is damaged, and
    Interrupted when `stop` is set during a harvest; complete shards are kept.
    """
    if config.synthetic.features:
        return Sources(*open_synthetic(config.synthetic), None)
    if config.activations.is_array:
        path, ratio = config.activations.path, config.activations.max_norm_ratio
        return Sources(*open_array(path, config.text.heldout_fraction, ratio), None)
    lm = load_language_model(config.lm)
    if config.activations.buffer:
        mesh = mesh_of_run(config, _experts(config))
        return Sources(ActivationStream(lm, config, mesh), None, lm)
    path = Path(config.activations.path or workdir / "activations")

    def progress(done: int, total: int) -> None:
        console.progress("harvest", done, total)
        if processes.any_of(stop.is_set()):
            raise Interrupted(f"harvest stopped at {done} of {total} activations")

    with _held(lambda: folders.lock(path.with_name(f".{path.name}.lock"), console.note)):
        unread = is_complete(path) and not (workdir / "checkpoints").exists()
        harvest(lm, config.text, resolved(config).activations, config.lm, path, progress)
        store = open_store(path)
        if unread:
            processes.lead_alone(lambda: verify(store, partial(console.progress, "checksums")))
    if store.manifest.note:
        console.note(store.manifest.note)
    return Sources(store, None, lm)


@contextlib.contextmanager
def _held(lock: Callable[[], FileLock]) -> Iterator[None]:
    """Holds a lock, in the leading process, for all of this program."""
    held = processes.lead_alone(lock)
    try:
        yield
    finally:
        if held is not None:
            held.release()


def heldout_text(
    config: Config,
    text: TextConfig,
    sources: Sources,
    on_skip: Callable[[Document], object] = lambda document: None,
) -> Iterator[EvalBatch]:
    """Batches of `config.eval.tokens` tokens of `text` that were never trained on, as they come.

    Args:
      sources: those of a run with a language model.
      on_skip: called with every document left out because it was trained on.
    """
    same = dataclasses.replace(text, max_documents=0, context=0) == dataclasses.replace(
        config.text, max_documents=0, context=0
    )
    documents = heldout_documents(text, sources.train.documents(), same, on_skip)
    return text_batches(dataclasses.replace(config, text=text), sources.lm, documents)


def read_heldout(
    config: Config, text: TextConfig, sources: Sources, console: Console = Console()
) -> Heldout:
    """The held-out activations, on the host: the evaluator and PCA read them.

    What depends on the model alone, up to them and on from them ablated, is run here, once.

    Args:
      text: where to evaluate. On the text trained on, its held-out documents count; of another
        text all documents do, except those that were trained on.

    Raises UserError if no token is left.
    """
    skipped, asked, what = [], config.eval.tokens, "held-out activations"
    if sources.lm is None:
        batches = array_batches(sources.heldout, asked)
    else:
        batches = heldout_text(config, text, sources, skipped.append)
    kept, tokens, places = [], 0, 0
    console.progress(what, 0, asked)
    for batch in batches:
        batch = batch._replace(x=np.asarray(batch.x))
        if sources.lm is not None:
            train = sources.train
            max_norm = largest_evaluated(train.median_norm, config.activations)
            batch = with_ablations(batch, sources.lm, config.lm.layer, train.mean, max_norm)
        kept.append(batch)
        tokens += int(batch.real.sum())
        places += int(batch.real.any(-1).sum()) * batch.real.shape[-1]
        console.progress(what, tokens, max(tokens, asked))
    if not tokens:
        why = f"the run was trained on {len(skipped)} of its documents" if skipped else (
            "it has no document to evaluate on that gives a token"
        )
        raise UserError(
            f"{_name_of_data(config, text)} leaves no held-out token: {why}; "
            "give other text with --config.text.path"
        )
    console.progress(what, tokens, tokens)
    if places < asked:
        console.note(
            f"{_name_of_data(config, text)} has no more than {tokens:,} held-out tokens: "
            f"config.eval.tokens = {asked:,} asks for more"
        )
    return Heldout(kept, tokens, len(skipped))


def run(
    config: Config,
    workdir: Path,
    stop: Event,
    console: Console = Console(),
    sources: Sources | None = None,
    heldout: Heldout | None = None,
) -> dict[str, Any]:
    """Harvests, trains and evaluates; goes on where an earlier call with this folder stopped.

    Args:
      sources, heldout: what `open_sources` and `read_heldout` return for this config, where runs
        share them; opened here if not given.

    Every process of a program calls this alike, with the same folder.

    Returns the contents of eval.json. Raises UserError for a user's mistake, before any work where
    it can be told by then, and Interrupted when `stop` was set; the same call then resumes.
    """
    check_run(config)
    with _held(lambda: folders.lock(workdir / ".run.lock")):
        return _run(config, workdir, stop, console, sources, heldout)


def _run(
    config: Config,
    workdir: Path,
    stop: Event,
    console: Console,
    sources: Sources | None,
    heldout: Heldout | None,
) -> dict[str, Any]:
    """`run`, in a folder that no other program works in."""
    for remark in processes.lead_alone(lambda: folders.claim(config, workdir)) or []:
        console.note(remark)
    sources = sources or open_sources(config, workdir, stop, console)
    check_rows(config, sources)
    config = sized(config, workdir, sources.train.d)
    show = lambda record: console.step(record, config.steps)  # noqa: E731
    summary = train(config, sources.train, workdir, stop, show)
    if not summary.finished:
        raise Interrupted(f"training stopped and saved at step {summary.step} of {config.steps}")
    heldout = heldout or read_heldout(config, config.text, sources, console)
    sae, params = summary.sae, precision.widen(summary.state.params)
    measured = sources, heldout, sae, params, summary.step, console
    return evaluate_run(config, config.text, workdir, *measured)


def evaluate_run(
    config: Config,
    text: TextConfig,
    workdir: Path,
    sources: Sources,
    heldout: Heldout,
    sae: Autoencoder,
    params: Params,
    step: int,
    console: Console = Console(),
) -> dict[str, Any]:
    """`measure_run` of the last checkpoint, then `write_evaluation`."""
    measured = sources, heldout, sae, params, step, console
    results = measure_run(config, text, workdir, *measured)
    write_evaluation(config, text, workdir, results, last=True)
    return results


def measure_run(
    config: Config,
    text: TextConfig,
    workdir: Path,
    sources: Sources,
    heldout: Heldout,
    sae: Autoencoder,
    params: Params,
    step: int,
    console: Console = Console(),
) -> dict[str, Any]:
    """What an autoencoder does on held-out activations, and what training cost up to it.

    Args:
      text: where `heldout` was read from.
      step: that of `params`.
    """
    store = sources.train
    done = itertools.accumulate(int(batch.real.sum()) for batch in heldout.batches)

    def progress(_: int) -> None:
        console.progress("evaluate", next(done), heldout.tokens)

    console.progress("evaluate", 0, heldout.tokens)
    results = evaluate(
        sae,
        params,
        heldout.batches,
        mean=store.mean,
        median_norm=store.median_norm,
        max_norm_ratio=evaluated(config.activations).max_norm_ratio,
        lm=sources.lm,
        layer=None if sources.lm is None else config.lm.layer,
        training=_bill(workdir, step),
        bootstrap=config.eval.bootstrap,
        seed=config.eval.seed,
        progress=progress,
    )
    sample = store.rows(np.linspace(0, store.n - 1, min(store.n, PCA_ROWS)).astype(np.int64))
    max_norm = largest_evaluated(store.median_norm, config.activations)
    directions = pca.components(sample, np.asarray(store.mean), min(config.sae.k, store.d))
    fvu_pca = pca.fvu(heldout.batches, np.asarray(store.mean), directions, max_norm)
    results["fvu_pca"] = json_value(fvu_pca)
    results["eval_text"] = _name_of_data(config, text)
    results["eval_documents_skipped"] = heldout.skipped
    results["step"] = step
    results["architecture"] = config.sae.architecture
    results["match"] = config.sae.match
    if isinstance(sources.heldout, SyntheticActivations):
        truth = measure_ground_truth(sae, params, sources.heldout, config.eval.tokens)
        results |= {name: json_value(value) for name, value in truth.items()}
    return results


def write_evaluation(
    config: Config, text: TextConfig, workdir: Path, results: dict[str, Any], last: bool
) -> Path:
    """Writes evals/NAME.json, and eval.json if this is the evaluation that the run itself makes.

    NAME is the text's, with a digest of its settings if it is not the run's own; another step than
    the last one, and other settings than those in config.json, are in it too.

    Args:
      config, text, results: as of `measure_run`.
      last: whether `results` are of the newest checkpoint.

    Returns the file in evals/. Raises UserError if it cannot be written.
    """
    own_text = config.activations.is_array or config.synthetic.features or text == config.text
    own_eval = config.eval == folders.read_config(workdir).eval
    words = [Path(str(results["eval_text"])).stem, text.where.replace("!=", " not ")]
    words += [] if own_text else [digest(dataclasses.asdict(text))]
    words += [] if last else [f"step {results['step']}"]
    words += [] if own_eval else [f"eval {digest(dataclasses.asdict(config.eval))}"]
    name = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(words)).strip("-")
    path = workdir / "evals" / f"{name}.json"

    def write() -> None:
        remedy = "make room or the folder writable, then evaluate again"
        with telling(f"the evaluation cannot be written to {path}", remedy):
            path.parent.mkdir(exist_ok=True)
            folders.write_json(path, results)
            if own_text and own_eval and last:
                folders.write_json(workdir / "eval.json", results)

    processes.lead_alone(write)
    return path


def load(
    path: str | Path, step: int | str = "latest", mesh: Mesh | None = None
) -> tuple[Autoencoder, Params]:
    """A trained autoencoder and its parameters, in float32, from the folder of a run.

    Args:
      path: the --workdir of a run.
      step: a checkpoint's step, 'latest', or 'best' (lowest running FVU).
      mesh: devices to put it on, whatever mesh it was trained on; one device of this process if
        not given.

    Raises UserError when the folder holds no run or no such checkpoint.
    """
    workdir = Path(path)
    config = folders.read_config(workdir)
    with _checkpoints(workdir, config) as checkpoints:
        number = _step_of(checkpoints, workdir, step)
        width = checkpoints.width(number)
        sae = build(sized(config, workdir, width).sae, width)
        tx = optimiser(config.optim, sae.latents, config.steps, sae.config.decoder_norm)
        restored = checkpoints.restore(number, state.abstract(sae, tx, config.optim, mesh))
    return on_mesh(sae, mesh) if mesh else sae, precision.widen(restored.params)


def find_step(path: str | Path, step: int | str = "latest") -> tuple[int, int]:
    """The checkpoint that `load` takes, and the newest one. Raises UserError as it does."""
    workdir = Path(path)
    with _checkpoints(workdir, folders.read_config(workdir)) as checkpoints:
        return (_step_of(checkpoints, workdir, step), _step_of(checkpoints, workdir, "latest"))


def _checkpoints(workdir: Path, config: Config) -> Checkpoints:
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir} has no checkpoints yet: train it to its first one")
    return Checkpoints(workdir / "checkpoints", config.keep_checkpoints)


def _step_of(checkpoints: Checkpoints, workdir: Path, step: int | str) -> int:
    named = {"latest": checkpoints.latest, "best": checkpoints.best}
    number = named.get(step, step) if isinstance(step, str) else step
    if number is None:
        raise UserError(f"{workdir} has no complete checkpoint: train it to its first one")
    if number not in checkpoints.steps:
        have = ", ".join(map(str, checkpoints.steps))
        raise UserError(f"{workdir} has no checkpoint {step}: there are {have}, latest, best")
    return number


def sized(config: Config, workdir: Path, width: int) -> Config:
    """match='time' as the dictionary width that it comes to, measured once a run: matched.json."""
    if config.sae.match != "time":
        return config
    path = workdir / "matched.json"

    def measure() -> None:
        if not path.exists():
            latents = equal_time_latents(config.sae, width, config.batch_size)
            folders.write_json(path, {"latents": latents})

    processes.lead_alone(measure)
    latents = folders.read_json(path, "a run matched by time").get("latents")
    if not isinstance(latents, int) or latents < config.sae.k:
        raise UserError(f"{path} does not hold a number of latents: start a new run")
    sae = dataclasses.replace(config.sae, latents=latents, experts=1, active=1)
    return dataclasses.replace(config, sae=sae)


def _experts(config: Config) -> int:
    """Experts of the run. Raises UserError as `build`; a width by time is not known yet."""
    by_time = config.sae.match == "time" and not has_experts(config.sae)
    return 1 if by_time else build(config.sae, 1).experts


def _name_of_data(config: Config, text: TextConfig) -> str:
    if config.synthetic.features:
        return f"synthetic-{config.synthetic.features}"
    return config.activations.path if config.activations.is_array else text.path


def resolved(config: Config) -> Config:
    """`activations.tokens` = 0 means as many as the run trains on."""
    tokens = config.activations.tokens or config.steps * config.batch_size
    activations = dataclasses.replace(config.activations, tokens=tokens)
    return dataclasses.replace(config, activations=activations)


def _bill(workdir: Path, step: int) -> dict[str, float | int | None]:
    """What training up to `step` cost; between two records, by their line."""
    lines = metrics.read_lines(workdir / "metrics.jsonl")
    lines = [line for line in lines if {"tokens", "seconds"} <= line.keys()]
    if not lines:
        return {}
    steps, tokens, seconds = ([line[n] for line in lines] for n in ("step", "tokens", "seconds"))
    tokens, seconds = round(np.interp(step, steps, tokens)), float(np.interp(step, steps, seconds))
    lines = [line for line in lines if line["step"] <= step] or lines[:1]
    return {
        "tokens_seen": tokens,
        "train_seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "seconds_per_step": _seconds_per_step(lines),
        "trained_together": lines[-1].get("together", 1),
    }


def _seconds_per_step(lines: list[dict[str, Any]]) -> float | None:
    """Median over the stretches between two records, so that compiling does not count."""
    stretches = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(lines)
    ]
    return float(np.median(stretches)) if stretches else None
