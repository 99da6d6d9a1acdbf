"""More experts of one size, two active: the dictionary grows, the cost of a token does not.

    python -m experiments.sweep --grid=configs/grids/experts.py --workdir=runs/experts
    python -m experiments.report --workdir=runs/experts

256 latents an expert. Arguments: base.py.
"""

from configs.grids import base
from scale_sae_jax.sweep import axis, product

SIZE = 256


def get_grid(arg=""):
    arg = base.parse(arg)
    sizes = [{"experts": n, "latents": SIZE * n} for n in (4, 8, 16, 32, 64)]
    return base.cells(arg, product(axis("preset", ("paper", "ours", "switch")), sizes))
