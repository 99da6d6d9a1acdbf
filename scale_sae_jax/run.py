"""A whole run, one street: check, harvest, train, evaluate. Commands and scripts call these."""

import dataclasses
import itertools
import re
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from jax.sharding import Mesh

from scale_sae_jax import workdir as folders
from scale_sae_jax.activations.masks import evaluated, largest_evaluated
from scale_sae_jax.activations.synthetic import SyntheticActivations
from scale_sae_jax.config import Config, TextConfig, digest
from scale_sae_jax.console import Console
from scale_sae_jax.errors import UserError, telling
from scale_sae_jax.evaluation import pca
from scale_sae_jax.evaluation.evaluator import evaluate, json_value
from scale_sae_jax.evaluation.ground_truth import measure_ground_truth
from scale_sae_jax.parallel import processes
from scale_sae_jax.parallel.experts import on_mesh
from scale_sae_jax.parallel.mesh import mesh_of_run
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.registry import build, experts_of, without_effect
from scale_sae_jax.sources import (
    Heldout,
    Sources,
    check_rows,
    check_sources,
    name_of_data,
    open_sources,
    read_heldout,
)
from scale_sae_jax.text.splits import heldout_documents
from scale_sae_jax.training import metrics, precision, state
from scale_sae_jax.training.checkpoints import Checkpoints
from scale_sae_jax.training.interrupts import Interrupted
from scale_sae_jax.training.loop import train
from scale_sae_jax.training.matching import equal_time_latents

PCA_ROWS = 65_536


def check_run(config: Config) -> None:
    """`check_sources`, and what the architecture, the devices or the text to hold out forbid."""
    _refuse_unread(config)
    check_sources(config)
    if config.wandb:
        processes.lead_alone(metrics.import_wandb)
    mesh_of_run(config, experts_of(config.sae))
    if config.synthetic.features or config.activations.is_array:
        return
    text, trained = config.text, np.empty(0, np.uint64)
    if next(heldout_documents(text, trained, same_text=True), None) is None:
        how = f"heldout_path = '{text.heldout_path}'" if text.heldout_path else (
            f"heldout_fraction = {text.heldout_fraction} of config.text.path = '{text.path}'"
        )
        raise UserError(
            f"config.text.{how} holds out no document to evaluate on: raise "
            "--config.text.heldout_fraction, give more text, or name some with "
            "--config.text.heldout_path=FILE.jsonl"
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
    with folders.held(workdir / ".run.lock"):
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
    for name in without_effect(config.sae):
        console.note(
            f"config.sae.{name} does nothing: architecture '{config.sae.architecture}' has no such "
            "option"
        )
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
    results = measure_run(config, config.text, workdir, *measured)
    write_evaluation(config, config.text, workdir, results, last=True)
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
        training=_bill(config, workdir, step),
        bootstrap=config.eval.bootstrap,
        seed=config.eval.seed,
        progress=progress,
    )
    sample = store.rows(np.linspace(0, store.n - 1, min(store.n, PCA_ROWS)).astype(np.int64))
    max_norm = largest_evaluated(store.median_norm, config.activations)
    directions = pca.components(sample, np.asarray(store.mean), min(config.sae.k, store.d))
    fvu_pca = pca.fvu(heldout.batches, np.asarray(store.mean), directions, max_norm)
    results["fvu_pca"] = json_value(fvu_pca)
    results["eval_text"] = name_of_data(config, text)
    results["eval_documents_skipped"] = heldout.skipped
    results["median_norm"] = float(store.median_norm)
    results["step"] = step
    results["architecture"] = config.sae.architecture
    results["match"] = config.sae.match
    if isinstance(sources.heldout, SyntheticActivations):
        truth = measure_ground_truth(sae, params, sources.heldout, config.eval.tokens)
        results |= {name: json_value(value) for name, value in truth.items()}
    if (results["fvu"] or 0) > 1:
        console.note(
            f"FVU {results['fvu']:.3g}: the mean activation alone has 1; train longer, or, where "
            "activations are far from the unit size, with --config.sae.input_scale=true"
        )
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
    words = [Path(str(results["eval_text"])).stem]
    words += [text.where.replace("!=", " not ")] if config.lm.path else []
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
        params = checkpoints.restore_params(number, state.abstract_params(sae, config.optim, mesh))
    return on_mesh(sae, mesh) if mesh else sae, precision.widen(params)


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
    number = named.get(step, step)
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    if number is None:
        raise UserError(f"{workdir} has no complete checkpoint: train it to its first one")
    if number not in checkpoints.steps:
        have = ", ".join(map(str, checkpoints.steps))
        raise UserError(f"{workdir} has no checkpoint {step}: there are {have}, latest, best")
    return int(number)


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


def _bill(config: Config, workdir: Path, step: int) -> dict[str, float | int | None]:
    """What training up to the checkpoint at `step` cost; None where its files do not tell."""
    with _checkpoints(workdir, config) as checkpoints:
        seconds = checkpoints.seconds(step)
    tokens = step * config.batch_size
    lines = metrics.read_lines(workdir / "metrics.jsonl")
    timed = lambda line: isinstance(line.get("seconds"), int | float)  # noqa: E731
    lines = [line for line in lines if line["step"] <= step and timed(line)]
    return {
        "tokens_seen": tokens,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "seconds_per_step": _seconds_per_step(lines),
        "trained_together": lines[-1].get("together", 1) if lines else None,
    }


def _seconds_per_step(lines: list[dict[str, Any]]) -> float | None:
    """Median over the stretches between two records, so that compiling does not count."""
    stretches = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(lines)
    ]
    return float(np.median(stretches)) if stretches else None
