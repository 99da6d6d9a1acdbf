"""A static site about what the latents and experts of a run do. Opens from disk, needs no network.

    python -m experiments.dashboard --workdir=runs/quickstart
    python -m experiments.dashboard --workdir=runs/quickstart --text="The cell divides." \\
        --latents=0-511
    python -m experiments.dashboard --workdir=runs/quickstart --config.text.path=OTHER.jsonl

Contexts come from text that the run never trained on: its held-out documents, or another text, as
in experiments.evaluate. Writes DIR/dashboard/index.html and what it needs beside it.
"""

import dataclasses
import re
from pathlib import Path
from threading import Event

import numpy as np
from absl import flags

from experiments import command_line
from experiments.console import Bars
from experiments.trained import define_run, refuse_unused, text_asked_for
from scale_sae_jax import attach, load
from scale_sae_jax.activations.masks import evaluated, largest_evaluated
from scale_sae_jax.config import Config, from_config_dict
from scale_sae_jax.errors import UserError
from scale_sae_jax.inspection import look
from scale_sae_jax.inspection.contexts import Plan
from scale_sae_jax.interop import neuronpedia
from scale_sae_jax.report.dashboard import About, sentence, site_folder, tokens_named, write_site
from scale_sae_jax.sae import Autoencoder
from scale_sae_jax.sources import check_sources, heldout_text, open_sources
from scale_sae_jax.workdir import read_config

FLAGS = flags.FLAGS


def define(argv: list[str]) -> None:
    define_run(argv)
    flags.DEFINE_string("to", None, "New folder, or a dashboard's; WORKDIR/dashboard if not given.")
    flags.DEFINE_multi_string("text", [], "A sentence to show what fires on it; may be repeated.")
    flags.DEFINE_string("latents", "", "Which latents get a page, such as 0-511,700; all if empty.")
    flags.DEFINE_integer("tokens", 65_536, "Held-out tokens to read at most.", lower_bound=1)
    flags.DEFINE_integer("top", 10, "Largest contexts of a latent.", lower_bound=1)
    flags.DEFINE_integer("sampled", 12, "Contexts from a uniform sample.", lower_bound=0)
    flags.DEFINE_string(
        "neuronpedia", "", "MODEL_ID/SAE_SET: also write TO/neuronpedia/batch-N.json."
    )


def chosen(latents: str, total: int) -> np.ndarray:
    """Ascending ids from '0-511,700'; all if empty. Raises UserError if there is no such latent."""
    ids: set[int] = set()
    for part in filter(None, latents.split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise UserError(f"--latents: '{part}' is no id and no range: write 0-511,700")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise UserError(f"--latents: '{part}' is in the wrong order: write {last}-{first}")
        if last >= total:
            raise UserError(f"--latents: '{part}' must lie between 0 and {total - 1}")
        ids.update(range(first, last + 1))
    return np.array(sorted(ids), np.int64) if ids else np.arange(total)


def names_of_neuronpedia() -> tuple[str, str] | None:
    """(model id, set of autoencoders), if asked for."""
    if not FLAGS.neuronpedia:
        return None
    model, slash, sae_set = FLAGS.neuronpedia.partition("/")
    if not (model and slash and sae_set):
        raise UserError(f"--neuronpedia={FLAGS.neuronpedia} must read MODEL_ID/SAE_SET")
    return model, sae_set


def about(config: Config, workdir: Path, sae: Autoencoder, model: str, text: str) -> About:
    """What the pages are about: `model` by name, `text` by path."""
    return About(
        title=workdir.resolve().name,
        model=model,
        layer=config.lm.layer,
        architecture=sae.config.architecture,
        latents=sae.latents,
        experts=sae.experts,
        active=sae.active,
        k=sae.k,
        text=text,
    )


def main() -> None:
    workdir = Path(FLAGS.workdir)
    trained, asked = read_config(workdir), from_config_dict(FLAGS.config)
    if not trained.lm.path:
        raise UserError(f"{workdir} was trained without a language model: there is no text to show")
    refuse_unused(trained, asked, ("text",))
    names, folder = names_of_neuronpedia(), Path(FLAGS.to or workdir / "dashboard")
    text = text_asked_for(asked.text, trained.text)
    config = dataclasses.replace(
        trained, eval=dataclasses.replace(trained.eval, tokens=FLAGS.tokens)
    )
    check_sources(dataclasses.replace(config, text=text))
    sae, params = load(workdir, FLAGS.step)
    latents, folder = chosen(FLAGS.latents, sae.latents), site_folder(folder)
    bars, done = Bars(), 0

    def progress(tokens: int) -> None:
        nonlocal done
        done += tokens
        bars.progress("read", done, max(done, FLAGS.tokens))

    try:
        sources = open_sources(config, workdir, Event(), bars)
        lm = sources.lm
        max_norm = largest_evaluated(sources.train.median_norm, config.activations)
        bound = dict(max_norm=max_norm, masks=evaluated(config.activations), bos=text.bos)
        attached = attach(lm, sae, params, config.lm.layer, **bound)
        sentences = [sentence(words, attached.codes(words)) for words in FLAGS.text]
        batches = heldout_text(config, text, sources)
        plan = Plan(top=FLAGS.top, sampled=FLAGS.sampled)
        findings = look(
            lm, sae, params, batches, max_norm=max_norm, plan=plan, progress=progress
        )
    finally:
        bars.close()
    tokens = tokens_named(findings, lm.tokenizer)
    subject = about(config, workdir, sae, lm.name, text.path)
    size = write_site(folder, findings, subject, tokens, latents, sentences)
    if names is not None:
        model, sae_set = names
        features = folder / "neuronpedia"
        neuronpedia.write_batches(
            features, findings, lm.tokenizer, latents, model, config.lm.layer, sae_set
        )
        print(f"{features}/batch-*.json")
    print(f"{folder}/index.html  ({len(latents)} latents, {size / 1e6:.1f} MB)")


if __name__ == "__main__":
    command_line.start(main, define)
