"""The claims of the Scale SAE paper (arXiv 2511.05745), one part of the grid for each kind.

    python -m experiments.sweep --grid=configs/grids/reproduction.py --workdir=runs/reproduction
    python -m experiments.report --workdir=runs/reproduction --where=part=error

- error: lower error and less redundancy than Switch SAE and TopK at L0 32, 64 and 128, on general
  and on biomedical text, against rivals of equal active width, total width and time;
- active: two active experts are needed, and one fails. `gate=renorm` gives one expert weight 1, so
  that the router gets no gradient from the reconstruction; `prob` gives it one;
- scaling: scaling the high-frequency part of encoders helps, and the control `gain` does not.

One pass over `tokens` activations of SmolLM2, block 15, in 300 steps (`steps`);
docs/reproduction.md says what came out. Beside the arguments of every grid (base.py): tokens.
"""

from configs import biomedical
from configs.grids import base
from scale_sae_jax.config import from_config_dict
from scale_sae_jax.sweep import axis, product


def get_grid(arg=""):
    arg = base.parse(arg, steps=300, eval_tokens=2048, tokens=307_200)
    rivals = [("switch", "active"), ("switch", "width"), ("topk", "active"), ("topk", "time"),
              ("topk", "width"), ("batchtopk", "active")]
    arms = product(axis("preset", ("paper", "authors", "ours")), axis("match", ("both",)))
    arms += [{"preset": preset, "match": match} for preset, match in rivals]
    error = product(axis("part", ("error",)), axis("k", (32, 64, 128)), arms)

    gates = [{"preset": "paper", "gate": "prob"}, {"preset": "paper", "gate": "renorm"},
             {"preset": "authors", "gate": "softmax_probs"}, {"preset": "ours", "gate": "prob"}]
    active = product(axis("part", ("active",)), gates, axis("active", (1, 2, 4, 8)))

    kinds = axis("feature_scaling", ("none", "mean", "mean_lp", "gain"))
    presets = axis("preset", ("paper", "authors", "ours"))
    scaling = product(axis("part", ("scaling",)), presets, kinds)

    def changes(axes):
        told = {f"sae.{n}": axes[n] for n in ("gate", "feature_scaling") if n in axes}
        return told | ({"activations.tokens": arg.tokens} if arg.tokens else {})

    text = from_config_dict(biomedical.get_config()).text
    return [
        *base.cells(arg, error, changes, texts={"biomedical": text}),
        *base.cells(arg, [*active, *scaling], changes),
    ]
