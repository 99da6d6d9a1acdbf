"""The paper's main figure: error against L0, by number of experts, next to dictionaries without.

    python -m experiments.sweep --grid=configs/grids/l0_by_experts.py --workdir=runs/l0_by_experts
    python -m experiments.report --workdir=runs/l0_by_experts

The many-expert presets keep the total width, so that more experts mean fewer active latents. TopK
and BatchTopK are matched to 16 experts. Arguments: base.py.
"""

from configs.grids import base
from scale_sae_jax.sweep import axis, product


def get_grid(arg=""):
    arg = base.parse(arg)
    rivals = product(axis("preset", ("topk", "batchtopk")), axis("match", ("active", "width")))
    many = product(axis("preset", ("paper", "ours", "switch")), axis("experts", (8, 16, 32)))
    rivals = product(rivals, axis("experts", (16,)))
    return base.cells(arg, product(many + rivals, axis("k", (32, 64, 128))))
