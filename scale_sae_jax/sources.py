"""What a run reads: activations to train on, and held-out ones that it is measured on."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np

from scale_sae_jax import workdir as folders
from scale_sae_jax.activations.array import ActivationArray, open_array
from scale_sae_jax.activations.harvest import harvest
from scale_sae_jax.activations.masks import largest_evaluated
from scale_sae_jax.activations.store import ActivationStore, is_complete, open_store, verify
from scale_sae_jax.activations.stream import FIRST_ROWS, ActivationStream
from scale_sae_jax.activations.synthetic import (
    SyntheticActivations,
    check_synthetic,
    open_synthetic,
)
from scale_sae_jax.config import Config, TextConfig
from scale_sae_jax.console import Console
from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation.evaluator import EvalBatch, with_ablations
from scale_sae_jax.evaluation.heldout import array_batches, text_batches
from scale_sae_jax.files import looked_from
from scale_sae_jax.lm import LanguageModel, inspect_language_model, load_language_model
from scale_sae_jax.parallel import processes
from scale_sae_jax.parallel.mesh import mesh_of_run
from scale_sae_jax.sae.registry import experts_of
from scale_sae_jax.text.sources import Document, check_text
from scale_sae_jax.text.splits import heldout_documents
from scale_sae_jax.training.interrupts import Interrupted

# What the first two passes of the model that a buffer on devices needs are called.
FIRST_FILLED = {FIRST_ROWS: "first rows", 0: "first buffer"}


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


def check_rows(config: Config, sources: Sources) -> None:
    """Refuses sources with fewer activations than a batch. Raises UserError."""
    n = sources.train.n
    if n < config.batch_size:
        raise UserError(
            f"{name_of_data(config, config.text)} gives {n} activations to train on, fewer than "
            f"config.batch_size = {config.batch_size}: give more, or lower it"
        )


def open_sources(config: Config, workdir: Path, stop: Event, console: Console) -> Sources:
    """The activations to train on, harvested now if the store is not complete.

    A store that was complete before is read whole and compared with its checksums, unless the run
    in `workdir` has a checkpoint: it was compared then. Raises UserError if it is damaged, and
    Interrupted when `stop` is set during a harvest, whose complete shards are kept, or while the
    model fills a buffer, also a later one.
    """
    if config.synthetic.features:
        return Sources(*open_synthetic(config.synthetic), None)
    if config.activations.is_array:
        path, ratio = config.activations.path, config.activations.max_norm_ratio
        return Sources(*open_array(path, config.text.heldout_fraction, ratio), None)
    lm = load_language_model(config.lm)
    if config.activations.buffer:
        mesh = mesh_of_run(config, experts_of(config.sae))

        def filling(buffer: int, done: int, total: int) -> None:
            if buffer in FIRST_FILLED:  # later ones are filled between steps, whose bar is shown
                console.progress(FIRST_FILLED[buffer], done, total)
            if processes.any_of(stop.is_set()):
                raise Interrupted("stopped while the model filled a buffer of activations")

        return Sources(ActivationStream(lm, config, mesh, filling), None, lm)
    path = Path(config.activations.path or workdir / "activations")

    def progress(done: int, total: int) -> None:
        console.progress("harvest", done, total)
        if processes.any_of(stop.is_set()):
            raise Interrupted(f"harvest stopped at {done} of {total} activations")

    with folders.held(path.with_name(f".{path.name}.lock"), console.note, stop):
        complete, trained = is_complete(path), (workdir / "checkpoints").exists()
        if trained and not complete:
            console.note(f"{path} holds no complete store{looked_from(path)}: harvested again")
        harvest(lm, config.text, resolved(config).activations, config.lm, path, progress)
        store = open_store(path)
        if complete and not trained:
            processes.lead_alone(lambda: verify(store, partial(console.progress, "checksums")))
    if store.manifest.note:
        console.note(store.manifest.note)
    return Sources(store, None, lm)


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
            f"{name_of_data(config, text)} leaves no held-out token: {why}; "
            "give other text with --config.text.path"
        )
    console.progress(what, tokens, tokens)
    if places < asked:
        console.note(
            f"{name_of_data(config, text)} has no more than {tokens:,} held-out tokens: "
            f"config.eval.tokens = {asked:,} asks for more"
        )
    return Heldout(kept, tokens, len(skipped))


def resolved(config: Config) -> Config:
    """`activations.tokens` = 0 means as many as the run trains on."""
    tokens = config.activations.tokens or config.steps * config.batch_size
    activations = dataclasses.replace(config.activations, tokens=tokens)
    return dataclasses.replace(config, activations=activations)


def name_of_data(config: Config, text: TextConfig) -> str:
    """What the activations are of: a text, an array, or features."""
    if config.synthetic.features:
        return f"synthetic-{config.synthetic.features}"
    return config.activations.path if config.activations.is_array else text.path
