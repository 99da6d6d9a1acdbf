"""Write a trained autoencoder for another library, or put it on the Hugging Face hub.

    python -m experiments.export --workdir=runs/quickstart --format=sae_lens --to=exports/quickstart
    python -m experiments.export --workdir=runs/topk --format=sparsify --to=exports/sparsify
    python -m experiments.export --workdir=runs/jumprelu --format=gemma_scope --to=exports/gemma
    python -m experiments.export --workdir=runs/quickstart --format=delphi --to=exports/delphi
    python -m experiments.export --workdir=runs/quickstart --format=hub --to=OWNER/REPO

--workdir may also be a folder of SAELens, sparsify or dictionary_learning, or a hub name; delphi
needs the folder of a run, whose held-out text it encodes, or other text with --config.text.path.
docs/formats.md says what each format can express; what it cannot is refused, with the reason.
"""

import dataclasses
from pathlib import Path
from threading import Event
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments import command_line
from experiments.console import Bars
from experiments.trained import refuse_unused, text_asked_for
from scale_sae_jax import load
from scale_sae_jax.activations.masks import largest_evaluated
from scale_sae_jax.config import Config, from_config_dict, to_config_dict
from scale_sae_jax.errors import UserError
from scale_sae_jax.interop import delphi, files, gemma_scope, hub, origin, sae_lens, sparsify
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sources import check_sources, open_sources, read_heldout
from scale_sae_jax.workdir import read_config

FLAGS = flags.FLAGS
SPLITS = 5
FORMATS = ["sae_lens", "sparsify", "gemma_scope", "delphi", "hub"]


def define(argv: list[str]) -> None:
    """The settings to override are those of --workdir, if that is a run."""
    flags.DEFINE_string("workdir", None, "Folder of the run, or of another library's autoencoder.")
    flags.DEFINE_string("step", "latest", "Checkpoint of a run: a step, 'latest' or 'best'.")
    flags.DEFINE_enum("format", None, FORMATS, "What to write.")
    flags.DEFINE_string("to", None, "New or empty folder; for the hub OWNER/REPO.")
    flags.DEFINE_integer("expert", None, "sae_lens, sparsify: this expert alone.", lower_bound=0)
    flags.DEFINE_bool("decoder_only", False, "sparsify: the decoder, for codes made here.")
    flags.DEFINE_string("hookpoint", None, "sparsify, delphi: module that is read; layers.LAYER.")
    flags.DEFINE_string("model_name", None, "Name of the model there; that of --config.lm.path.")
    flags.DEFINE_string("sae_id", None, "hub: folder in the repository; layers.LAYER.")
    flags.DEFINE_bool("private", False, "hub: create the repository as a private one.")
    flags.DEFINE_integer("splits", None, "delphi: files that share the latents; 5.", lower_bound=1)
    workdir = command_line.given(argv, "workdir")
    if workdir is not None and _is_run(workdir):
        settings = to_config_dict(read_config(Path(workdir)))
        config_flags.DEFINE_config_dict("config", settings)
    flags.mark_flags_as_required(["workdir", "format", "to"])


def _is_run(workdir: str) -> bool:
    return (Path(workdir) / "checkpoints").is_dir()


def main() -> None:
    config = read_config(Path(FLAGS.workdir)) if _is_run(FLAGS.workdir) else None
    _check_flags(config)
    sae, params = load(FLAGS.workdir, FLAGS.step)
    metadata = origin.metadata(config) if config else {}
    if FLAGS.model_name is not None:
        metadata["model_name"] = FLAGS.model_name
    folder, hookpoint = Path(FLAGS.to), FLAGS.hookpoint or _default_hookpoint(config)
    if FLAGS.format == "sae_lens":
        sae_lens.save(sae, params, folder, metadata, FLAGS.expert)
        print(f"written: {folder}")
    elif FLAGS.format == "gemma_scope":
        gemma_scope.save(sae, params, folder)
        print(f"written: {folder / gemma_scope.WEIGHTS}")
    elif FLAGS.format == "hub":
        name = hub.push_to_hub(
            sae, params, FLAGS.to, FLAGS.sae_id or hookpoint, metadata, FLAGS.private
        )
        print(f"uploaded: {name}")
    elif FLAGS.format == "sparsify":
        if FLAGS.decoder_only:
            sparsify.save_decoder(sae, params, folder, hookpoint)
        else:
            sparsify.save(sae, params, folder, hookpoint, FLAGS.expert)
        print(f"written: {folder / hookpoint}")
    else:
        export_delphi(config, sae, params, folder, hookpoint, metadata)


def _check_flags(config: Config | None) -> None:
    """Refuses flags and settings that the format would not heed."""
    for flag, formats in (
        ("expert", ("sae_lens", "sparsify")),
        ("decoder_only", ("sparsify",)),
        ("hookpoint", ("sparsify", "delphi")),
        ("splits", ("delphi",)),
        ("sae_id", ("hub",)),
        ("private", ("hub",)),
        ("model_name", ("sae_lens", "delphi", "hub")),
    ):
        if FLAGS[flag].value not in (None, False) and FLAGS.format not in formats:
            raise UserError(f"--{flag} is for --format={' or '.join(formats)}: leave it out")
    if config is not None:
        used = ("text", "eval.tokens") if FLAGS.format == "delphi" else ()
        refuse_unused(config, from_config_dict(FLAGS.config), used)
    if FLAGS.decoder_only and FLAGS.expert is not None:
        raise UserError("--decoder_only writes all experts' rows: leave --expert out")
    if FLAGS.format == "delphi" and (config is None or not config.lm.path):
        raise UserError(
            "--format=delphi encodes text, so --workdir must be a run with a language model"
        )


def _default_hookpoint(config: Config | None) -> str:
    return origin.hookpoint(config) if config and config.lm.path else "sae"


def export_delphi(
    config: Config,
    sae: Autoencoder,
    params: Params,
    folder: Path,
    hookpoint: str,
    metadata: dict[str, Any],
) -> None:
    """The cache of the run's held-out text, or of the text that was asked for instead."""
    files.fresh(files.inside(folder, hookpoint, "hookpoint"))  # before the model runs
    asked = from_config_dict(FLAGS.config)
    text = text_asked_for(asked.text, config.text)
    config = dataclasses.replace(config, eval=asked.eval)
    check_sources(dataclasses.replace(config, text=text))
    settings = {
        "model_name": metadata["model_name"],
        "dataset_repo": origin.public_name(text.path),
        "dataset_name": text.subset,
        "dataset_split": text.split,
        "dataset_column": text.field,
    }
    bars = Bars()
    try:
        sources = open_sources(config, Path(FLAGS.workdir), Event(), bars)
        heldout = read_heldout(config, text, sources, bars)
    finally:
        bars.close()
    max_norm = largest_evaluated(sources.train.median_norm, config.activations)
    writer = delphi.save(
        sae, params, heldout.batches, folder, hookpoint, settings, FLAGS.splits or SPLITS, max_norm
    )
    print(f"written: {folder / hookpoint}, {writer.rows} rows, {writer.fired:,} activations")


if __name__ == "__main__":
    command_line.start(main, define)
