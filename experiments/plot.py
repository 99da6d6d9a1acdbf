"""Draw the training curve of a run: FVU against activations seen, with its held-out yardsticks.

    python -m experiments.plot --workdir=runs/quickstart --output=curve.png
"""

from pathlib import Path

from absl import flags

from experiments import command_line
from scale_sae_jax.errors import UserError
from scale_sae_jax.training.metrics import read_lines
from scale_sae_jax.workdir import read_config, read_json

FLAGS = flags.FLAGS
SHOWN = ("fvu", "total_width", "active_width", "l0")  # of eval.json


def define(argv: list[str]) -> None:
    del argv
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("output", None, "Picture, .png or .svg; WORKDIR/curve.png if not given.")
    flags.mark_flag_as_required("workdir")


def main() -> None:
    workdir = Path(FLAGS.workdir)
    config = read_config(workdir)
    lines = read_lines(workdir / "metrics.jsonl")
    if not lines:
        raise UserError(f"{workdir} has no metrics yet: train it first")
    results = read_json(workdir / "eval.json", "a finished run: train it to the end")
    missing = [name for name in SHOWN if results.get(name) is None]
    if missing:
        raise UserError(f"{workdir}/eval.json has no {', '.join(missing)}: write it anew with "
                        f"experiments.evaluate --workdir={workdir}")
    matplotlib = command_line.import_matplotlib()
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    seen, fvu = zip(*((line["tokens"], line["fvu"]) for line in lines), strict=True)
    axes.plot(seen, fvu, label="training batches")
    axes.axhline(results["fvu"], color="C1", label=f"held out: {results['fvu']:.3f}")
    if results.get("fvu_pca") is not None:
        axes.axhline(results["fvu_pca"], color="C2", ls="--",
                     label=f"PCA of rank {config.sae.k}, held out: {results['fvu_pca']:.3f}")
    axes.set(xlabel="activations seen", ylabel="FVU", ylim=(0, 1),
             title=f"{workdir.name}: {config.sae.architecture}, {results['total_width']} latents, "
                   f"{results['active_width']} a token computes, L0 = {results['l0']:.1f}")
    axes.legend()
    output = Path(FLAGS.output or workdir / "curve.png")
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {output}: {error}; choose another --output") from None
    print(output)


if __name__ == "__main__":
    command_line.start(main, define)
