"""Neuronpedia's upload format (SAEDashboard's): batch-{i}.json, a list of features in each.

The contexts are those of the dashboard: `top` with bin_min = bin_contains = -1, then bands of the
uniform sample, each with the share of peaks that lie in it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from scale_sae_jax.errors import telling
from scale_sae_jax.inspection.bands import bands
from scale_sae_jax.inspection.contexts import OUTSIDE, Peaks
from scale_sae_jax.inspection.look import Findings
from scale_sae_jax.text.tokenizers import Tokenizer

FEATURES = 128  # in a file


def write_batches(
    folder: Path,
    findings: Findings,
    tokenizer: Tokenizer,
    latents: Int[np.ndarray, " n"],
    model_id: str,
    layer: int,
    sae_set: str,
) -> int:
    """Writes the features of `latents` into a folder and returns the number of files.

    Args:
      model_id, sae_set: Neuronpedia's names of the model and of the set of autoencoders.

    Batches that were there before are replaced, other files stay. Raises UserError if the folder
    cannot be written.
    """
    head = {"model_id": model_id, "layer": layer, "sae_set": sae_set}
    starts = range(0, len(latents), FEATURES)
    with telling(f"cannot write {folder}", "choose another --to"):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("batch-*.json"):
            old.unlink()
        for number, start in enumerate(starts):
            ids = latents[start : start + FEATURES].tolist()
            features = [feature(findings, tokenizer, latent) for latent in ids]
            text = json.dumps(head | {"features": features}, allow_nan=False)
            (folder / f"batch-{number}.json").write_text(text)
    return len(starts)


def feature(findings: Findings, tokenizer: Tokenizer, latent: int) -> dict[str, Any]:
    """One latent as Neuronpedia's feature."""
    seen, words, plan = findings.contexts, findings.words, findings.plan
    top = seen.top.of(latent)

    def strings(ids: Int[np.ndarray, " n"]) -> list[str]:
        return [tokenizer.token_string(int(token)) for token in ids]

    def activations(peaks: Peaks, low: float, high: float, share: float) -> Iterator[dict]:
        for ids, acts in zip(peaks.tokens, peaks.acts, strict=True):
            inside = ids != OUTSIDE
            yield {
                "bin_min": low,
                "bin_max": high,
                "bin_contains": share,
                "tokens": strings(ids[inside]),
                "values": _listed(acts[inside]),
                "qualifying_token_index": int(inside[: plan.before].sum()),
            }

    contexts, centres, heights = [], [], []
    if len(top.value):
        contexts += activations(top, -1.0, float(top.value[0]), -1.0)
        for band in bands(seen.sample.of(latent), top):
            contexts += activations(band.contexts, band.low, band.high, band.share)
        width = 2.0 ** int(seen.exponent[latent]) / plan.bins
        centres = _listed((np.arange(plan.bins) + 0.5) * width)
        heights = seen.histogram[latent].tolist()
    return {
        "feature_index": latent,
        "neg_str": strings(words.suppressed[latent]),
        "neg_values": _listed(words.suppressed_logits[latent]),
        "pos_str": strings(words.promoted[latent]),
        "pos_values": _listed(words.promoted_logits[latent]),
        "frac_nonzero": float(seen.firing[latent] / seen.tokens),
        "freq_hist_data_bar_values": centres,
        "freq_hist_data_bar_heights": heights,
        "activations": contexts,
    }


def _listed(values: Float[np.ndarray, " n"]) -> list[float]:
    return [round(float(value), 4) for value in values]
