"""The same active and total width as few large experts or many small ones.

    python -m experiments.sweep --grid=configs/grids/granularity.py --workdir=runs/granularity
    python -m experiments.report --workdir=runs/granularity

`topk_scope=token` lets all active latents compete; `expert` gives each active expert k / e, the
control without competition. Arguments: base.py.
"""

from configs.grids import base
from scale_sae_jax.sweep import axis, product


def get_grid(arg=""):
    arg = base.parse(arg)
    splits = [{"experts": 8 * e, "active": e} for e in (1, 2, 4, 8)]
    points = product(axis("preset", ("paper",)), axis("scope", ("token", "expert")), splits)
    return base.cells(arg, points, lambda axes: {"sae.topk_scope": axes["scope"]})
