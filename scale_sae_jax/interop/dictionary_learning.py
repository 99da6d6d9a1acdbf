"""dictionary_learning (saprmarks): a folder with ae.pt and config.json, into ours.

    encoder.weight [L, D], encoder.bias [L], decoder.weight [D, L], b_dec [D], k [], threshold []

TopK keeps the k largest of ReLU((x - b_dec) W + b); BatchTopK those over `threshold`, -1 if it was
never set.
"""

from pathlib import Path

import numpy as np

from scale_sae_jax.errors import UserError
from scale_sae_jax.interop import files
from scale_sae_jax.interop.plain import PlainSAE, from_plain
from scale_sae_jax.sae.autoencoder import Autoencoder, Params

CFG, WEIGHTS = "config.json", "ae.pt"
KIND = "a dictionary_learning folder"
KINDS = {"AutoEncoderTopK": "topk", "BatchTopKSAE": "jumprelu"}
TENSORS = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"}


def load(folder: Path) -> tuple[Autoencoder, Params]:
    """Ours from a folder of a TopK or BatchTopK dictionary; needs PyTorch.

    Raises UserError for other dictionaries, damaged files, a pickle that holds more than tensors,
    weights that are not finite, and numbers that contradict each other.
    """
    source, where = str(folder / CFG), str(folder / WEIGHTS)
    trainer = files.field(files.read_cfg(folder / CFG, KIND), "trainer", dict, source)
    name, k = files.field(trainer, "dict_class", str, source), files.size(trainer, "k", source)
    if name not in KINDS:
        raise UserError(f"{source}: dict_class '{name:.40}' is not read: only {', '.join(KINDS)}")
    tensors = files.read_tensors(folder / WEIGHTS)
    files.refuse_others(tensors, TENSORS, where)
    if "k" in tensors and int(files.take(tensors, "k", (), where)) != k:
        raise UserError(f"{where} holds another k than the {k} of {source}: one of them is wrong")
    w_enc = files.take(tensors, "encoder.weight", (None, None), where)
    latents, d = w_enc.shape
    kind, threshold = KINDS[name], None
    if kind == "jumprelu":
        threshold = np.full(latents, files.take(tensors, "threshold", (), where))
    plain = PlainSAE(
        kind=kind,
        k=k,
        w_enc=w_enc.T,
        w_dec=files.take(tensors, "decoder.weight", (d, latents), where).T,
        b_enc=files.take(tensors, "encoder.bias", (latents,), where),
        b_dec=files.take(tensors, "b_dec", (d,), where),
        threshold=threshold,
    )
    return from_plain(plain)
