"""What the pages show, as plain values for JSON: one overview, and a record for each latent.

Tokens appear as indices into one table of strings. Numbers are rounded to three digits.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from scale_sae_jax.attached import TextCodes
from scale_sae_jax.evaluation.sparsity import density_metrics
from scale_sae_jax.inspection.bands import bands, peak_tokens
from scale_sae_jax.inspection.contexts import OUTSIDE, Peaks
from scale_sae_jax.inspection.look import Findings
from scale_sae_jax.text.tokenizers import Tokenizer

PEAK_TOKENS = 5  # of a latent, in lists and for search
SENTENCE_LATENTS = 8  # the strongest on each token of a sentence


@dataclass(frozen=True)
class About:
    """What the pages are about. title: a name of the run; text: where contexts come from."""

    title: str
    model: str
    layer: int
    architecture: str
    latents: int
    experts: int
    active: int
    k: int
    text: str


@dataclass(frozen=True)
class Tokens:
    """The token ids that the pages name, ascending, and their strings."""

    ids: Int[np.ndarray, " n"]
    strings: list[str]

    def places(self, ids: Int[np.ndarray, "*shape"]) -> list:
        """Indices into the table, -1 outside of a piece."""
        ids = np.asarray(ids)
        return np.where(ids == OUTSIDE, -1, np.searchsorted(self.ids, ids)).tolist()


def tokens_named(findings: Findings, tokenizer: Tokenizer) -> Tokens:
    """All tokens that the findings name."""
    seen, words = findings.contexts, findings.words
    profiles = np.array([t for profile in findings.profiles for t in profile.tokens], np.int64)
    parts = (seen.top.tokens, seen.sample.tokens, words.promoted, words.suppressed, profiles)
    ids = np.unique(np.concatenate([part.ravel() for part in parts]))
    ids = ids[ids != OUTSIDE]
    return Tokens(ids, [tokenizer.token_string(int(token)) for token in ids])


def overview(
    findings: Findings, about: About, tokens: Tokens, latents: Int[np.ndarray, " n"]
) -> dict[str, Any]:
    """What every page loads: the token table, a line for each of `latents`, and the experts."""
    seen, size = findings.contexts, about.latents // about.experts
    before = findings.plan.before
    live = np.bincount(np.flatnonzero(seen.firing) // size, minlength=about.experts)
    tops = (seen.top.of(latent) for latent in latents.tolist())
    return {
        "about": asdict(about) | {"tokens": seen.tokens, "size": size},
        "tokens": tokens.strings,
        "latents": {
            "id": latents.tolist(),
            "density": rounded(seen.firing[latents] / seen.tokens),
            "largest": rounded(largest(findings, latents)),
            "x": rounded(findings.plane.xy[latents, 0]),
            "y": rounded(findings.plane.xy[latents, 1]),
            "peaks": [tokens.places(peak_tokens(top, before)[:PEAK_TOKENS]) for top in tops],
            "promoted": tokens.places(findings.words.promoted[latents, :PEAK_TOKENS]),
        },
        "plane_share": rounded(findings.plane.share),
        "density": density_metrics(seen.firing, seen.tokens),
        "experts": [
            {
                "load": rounded(profile.load),
                "live": int(count),
                "tokens": tokens.places(np.array(profile.tokens, np.int64)),
                "shares": rounded(profile.shares),
                "lifts": rounded(profile.lifts),
            }
            for profile, count in zip(findings.profiles, live, strict=True)
        ],
    }


def latent_record(findings: Findings, tokens: Tokens, latent: int) -> dict[str, Any]:
    """What the page of one latent shows beside its line in the overview."""
    seen, words, near = findings.contexts, findings.words, findings.nearest
    top, before = seen.top.of(latent), findings.plan.before
    return {
        "firing": int(seen.firing[latent]),
        "pieces": int(seen.pieces[latent]),
        "histogram": seen.histogram[latent].tolist() if len(top.value) else [],
        "edge": 2.0 ** int(seen.exponent[latent]) if len(top.value) else 0,
        "top": contexts(top, before, tokens),
        "bands": [
            {
                "name": band.name,
                "low": rounded(band.low),
                "high": rounded(band.high),
                "contexts": contexts(band.contexts, before, tokens),
            }
            for band in bands(seen.sample.of(latent), top)
        ],
        "promoted": [tokens.places(words.promoted[latent]), rounded(words.promoted_logits[latent])],
        "suppressed": [
            tokens.places(words.suppressed[latent]), rounded(words.suppressed_logits[latent])
        ],
        "intra": neighbours(near.intra[latent], near.intra_cosine[latent]),
        "inter": neighbours(near.inter[latent], near.inter_cosine[latent]),
    }


def neighbours(
    ids: Int[np.ndarray, " k"], cosines: Float[np.ndarray, " k"]
) -> list[list[int | float]]:
    """[ids, cosines] of the latents that are there."""
    return [ids[ids >= 0].tolist(), rounded(cosines[ids >= 0])]


def contexts(peaks: Peaks, before: int, tokens: Tokens) -> list[list]:
    """[place of the peak, tokens, activations] of each window, without what lies outside."""
    found = []
    for ids, acts in zip(peaks.tokens, peaks.acts, strict=True):
        inside = ids != OUTSIDE
        peak = int(inside[:before].sum())
        found.append([peak, tokens.places(ids[inside]), rounded(acts[inside])])
    return found


def sentence(text: str, seen: TextCodes) -> dict[str, Any]:
    """Which experts and latents fire on each token of a text."""
    strongest = [
        list(seen.latents(position).items())[:SENTENCE_LATENTS]
        for position in range(len(seen.tokens))
    ]
    return {
        "text": text,
        "strings": seen.strings,
        "kept": seen.kept.tolist(),
        "experts": seen.experts.tolist(),
        "latents": [[[latent, rounded(value)] for latent, value in row] for row in strongest],
    }


def largest(findings: Findings, latents: Int[np.ndarray, " n"]) -> np.ndarray:
    """The largest activation of each latent, 0 if it never fired."""
    out = np.zeros(len(findings.contexts.firing), np.float32)
    np.maximum.at(out, findings.contexts.top.latent, findings.contexts.top.value)
    return out[latents]


def rounded(values: Any) -> Any:
    """A number, or a list of them, to three significant digits; whole ones without a point."""
    short = [float(f"{value:.3g}") for value in np.ravel(values).tolist()]
    whole = [int(value) if value.is_integer() else value for value in short]
    return whole if np.ndim(values) else whole[0]
