"""Gemma Scope's params.npz (arXiv 2408.05147), out: a JumpReLU of activations as they are.

    pre = x W_enc + b_enc     codes = ReLU(pre) where pre > threshold     x^ = codes W_dec + b_dec

x is not centred there, so b_dec W_enc goes into the encoder's bias.
"""

from io import BytesIO
from pathlib import Path

import numpy as np

from scale_sae_jax.interop import files
from scale_sae_jax.interop.plain import as_jumprelu, not_centred, to_plain
from scale_sae_jax.sae.autoencoder import Autoencoder, Params

WEIGHTS = "params.npz"


def save(sae: Autoencoder, params: Params, folder: Path) -> None:
    """Writes folder/params.npz: W_enc [D, L], W_dec [L, D], b_enc, threshold [L], b_dec [D].

    Args:
      folder: new or empty.

    Raises UserError for TopK and many experts, which are no JumpReLU, and weights not finite.
    """
    plain = as_jumprelu(to_plain(sae, params))
    tensors = {
        "W_enc": plain.w_enc,
        "W_dec": plain.w_dec,
        "b_enc": not_centred(plain),
        "b_dec": plain.b_dec,
        "threshold": plain.threshold,
    }
    arrays = files.finite(tensors, str(folder / WEIGHTS))
    files.fresh(folder)
    content = BytesIO()
    np.savez(content, **arrays)
    files.write_bytes(folder / WEIGHTS, content.getvalue())
