"""Trained on general text, evaluated on general and on biomedical text.

    python -m experiments.sweep --grid=configs/grids/biomedical.py --workdir=runs/biomedical
    python -m experiments.report --workdir=runs/biomedical

The quickstart's text without biology and health sciences, and that topic alone. Results on it are
the columns biomedical_fvu, biomedical_delta_ce and so on. Arguments: base.py.
"""

from configs import biomedical
from configs.grids import base
from scale_sae_jax.config import from_config_dict
from scale_sae_jax.sweep import axis, product


def get_grid(arg=""):
    arg = base.parse(arg)
    points = product(axis("preset", ("topk", "batchtopk")), axis("match", ("active",)))
    points += product(axis("preset", ("paper", "plain", "ours")), axis("match", ("both",)))
    text = from_config_dict(biomedical.get_config()).text
    return base.cells(arg, points, texts={"biomedical": text})
