"""An autoencoder attached to its language model: codes for text, and logits after edits of them.

    attached = scale_sae_jax.attach_run("runs/quickstart")
    seen = attached.codes("The cell divides.")           # seen.strings, seen.codes, seen.experts
    attached.predict("The capital of France is", ablate=[12], steer={7: 50.0})

Positions that the evaluator does not score (padding, position 0, special tokens, activations with
an outlying norm) have no codes here and are never edited.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import DTypeLike

from scale_sae_jax.activations.masks import evaluated, keep, largest_evaluated, token_flags
from scale_sae_jax.activations.store import MANIFEST, read_manifest
from scale_sae_jax.config import ActivationsConfig, Config
from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation.evaluator import kept_tokens
from scale_sae_jax.files import local
from scale_sae_jax.lm.load import LanguageModel, load_language_model
from scale_sae_jax.run import load
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.codes import Codes
from scale_sae_jax.workdir import read_config, read_json

Ids = Collection[int] | Int[Array | np.ndarray, "..."]  # of latents
SHORTEST_ROW = 16  # rows are as long as a power of two, so that few lengths are compiled


class Edit(NamedTuple):
    """What happens to the residual stream x at every kept position, in this order.

    splice []: x^ takes the place of x. ablate [A]: latents whose part value * direction is taken
    away, where they fire; what the autoencoder does not explain, x - x^, stays; -1 is none. steer
    [C]: latents whose decoder direction is added, `amounts` [C] times.
    """

    splice: Bool[Array, ""]
    ablate: Int[Array, " A"]
    steer: Int[Array, " C"]
    amounts: Float[Array, " C"]


class TextCodes(NamedTuple):
    """What fires on the S tokens of a text.

    tokens [S] int32, strings: each token as text, codes: values and ids [S, K] on the host, values
    0 where not kept, experts [S, E]: selected by the router, kept [S] bool.
    """

    tokens: np.ndarray
    strings: list[str]
    codes: Codes
    experts: np.ndarray
    kept: np.ndarray

    def latents(self, position: int) -> dict[int, float]:
        """Latents that fire at a position and their values, the strongest first."""
        values, ids = self.codes.values[position], self.codes.ids[position]
        order = np.argsort(-values, kind="stable")
        return {int(ids[i]): float(values[i]) for i in order if values[i] != 0}


class TextRow(NamedTuple):
    """A text as one padded row, a batch of one."""

    tokens: np.ndarray  # [1, R] int32
    segments: np.ndarray  # [1, R] int32, 0 after the text
    scored: np.ndarray  # [1, R] bool


def edited(
    sae: Autoencoder, params: Params, x: Float[Array, "*T D"], edit: Edit
) -> Float[Array, "*T D"]:
    """decode(codes without the ablated) + (x - x^, unless spliced) + amounts @ directions."""
    codes = sae.encode(params, x)
    gone = (codes.ids[..., None] == edit.ablate).any(-1)
    left = codes._replace(values=jnp.where(gone, 0, codes.values))
    error = jnp.where(edit.splice, 0, x - sae.decode(params, codes))
    return sae.decode(params, left) + error + edit.amounts @ sae.decoder(params)[edit.steer]


def edited_logits(
    lm: LanguageModel,
    sae: Autoencoder,
    layer: int,
    lm_params: PyTree,
    params: Params,
    row: TextRow,
    max_norm: Float[Array, ""],
    edit: Edit,
) -> Float[Array, "B S V"]:
    """Logits, float32, of rows whose kept positions are edited after block `layer`."""
    x, kept = residual(lm, layer, lm_params, row, max_norm)
    x = jnp.where(kept[..., None], edited(sae, params, x, edit), x)
    return lm.run_from(lm_params, x, row.segments, layer)


def residual(
    lm: LanguageModel, layer: int, lm_params: PyTree, row: TextRow, max_norm: Float[Array, ""]
) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"]]:
    """The output of block `layer`, float32, and which positions of it are kept."""
    x = lm.run_to(lm_params, row.tokens, row.segments, layer).astype(jnp.float32)
    return x, kept_tokens(x, row.scored, max_norm)


@dataclass(frozen=True, eq=False)
class Attached:
    """A language model with an autoencoder of the output of its block `layer`. See `attach`."""

    lm: LanguageModel
    sae: Autoencoder
    params: Params
    layer: int
    max_norm: float
    masks: ActivationsConfig
    bos: bool

    def codes(self, text: str) -> TextCodes:
        """What fires on each token of a text. Raises UserError if it is empty or too long."""
        row, length = self._row(text)
        codes, experts, kept = jax.tree.map(
            lambda a: np.asarray(a)[0, :length],
            self._encode(self.lm.params, self.params, row, np.float32(self.max_norm)),
        )
        tokens = row.tokens[0, :length]
        return TextCodes(tokens, self._strings(tokens), codes, experts, kept)

    def logits(
        self,
        text: str,
        *,
        splice: bool = False,
        ablate: Ids = (),
        steer: Mapping[int, float] | None = None,
    ) -> Float[np.ndarray, "S V"]:
        """Next-token logits, float32, at every token of a text; those of the model if no edit.

        Args:
          splice: the reconstruction takes the place of the activations.
          ablate: ids of latents that are set to zero; the reconstruction error stays.
          steer: latent id to the multiple of its decoder direction that is added to every kept
            position, whether the latent fires there or not.

        Raises UserError for an id that is no latent, and for a text that is empty or too long.
        """
        row, length = self._row(text)
        steer = steer or {}
        if not isinstance(ablate, Collection) or not isinstance(steer, Mapping):
            raise UserError("ablate takes a list of latents, steer a dict of latent: multiple")
        if not all(_is_finite(multiple) for multiple in steer.values()):
            raise UserError(f"steer = {dict(steer)}: multiples must be finite float32 numbers")
        gone, added = self._ids(ablate), self._ids(steer)
        if not (splice or gone or added):
            logits = self._clean(self.lm.params, row.tokens, row.segments)
        else:
            edit = Edit(
                np.bool_(splice),
                _filled(gone, -1, np.int32),
                _filled(added, 0, np.int32),
                _filled(list(steer.values()), 0, np.float32),
            )
            arrays = self.lm.params, self.params, row, np.float32(self.max_norm), edit
            logits = self._edited(*arrays)
        return np.asarray(logits)[0, :length]

    def predict(
        self,
        text: str,
        n: int = 5,
        *,
        splice: bool = False,
        ablate: Ids = (),
        steer: Mapping[int, float] | None = None,
    ) -> list[tuple[str, float]]:
        """The n likeliest next tokens after a text, edited as by `logits`, with probabilities."""
        if not isinstance(n, Integral) or n < 1:
            raise UserError(f"n = {n!r}: ask for a whole number of tokens, 1 at least")
        logits = self.logits(text, splice=splice, ablate=ablate, steer=steer)[-1]
        probs = np.asarray(jax.nn.softmax(logits))
        best = np.argsort(-probs, kind="stable")[:n]
        return [(self.lm.tokenizer.token_string(int(i)), float(probs[i])) for i in best]

    @cached_property
    def _clean(self):
        return jax.jit(self.lm.logits)

    @cached_property
    def _edited(self):
        return jax.jit(partial(edited_logits, self.lm, self.sae, self.layer))

    @cached_property
    def _encode(self):
        def encode(lm_params, params, row, max_norm):
            x, kept = residual(self.lm, self.layer, lm_params, row, max_norm)
            codes = self.sae.encode(params, x)
            values = jnp.where(kept[..., None], codes.values, 0)
            return codes._replace(values=values), self.sae.route(params, x).experts, kept

        return jax.jit(encode)

    def _row(self, text: Any) -> tuple[TextRow, int]:
        """The text as one padded row, and its length in tokens."""
        if not isinstance(text, str):
            raise UserError(f"{text!r:.60} is no text: give one string")
        tokenizer = self.lm.tokenizer
        ids = [tokenizer.bos_id] * self.bos + tokenizer.encode_batch([text])[0]
        if len(ids) <= self.bos:
            raise UserError("the text has no tokens: give some text")
        if len(ids) > self.lm.max_context:
            raise UserError(
                f"the text has {len(ids)} tokens, {self.lm.name} takes {self.lm.max_context}: "
                "shorten it"
            )
        size = max(SHORTEST_ROW, 1 << (len(ids) - 1).bit_length())
        tokens = np.zeros((1, min(size, self.lm.max_context)), np.int32)
        tokens[0, : len(ids)] = ids
        segments = (np.arange(tokens.shape[1]) < len(ids)).astype(np.int32)[None]
        scored = keep(token_flags(tokens, segments, tokenizer.special_ids), self.masks)
        return TextRow(tokens, segments, scored), len(ids)

    def _strings(self, tokens: Int[np.ndarray, " S"]) -> list[str]:
        return [self.lm.tokenizer.token_string(int(token)) for token in tokens]

    def _ids(self, latents: Collection[Any] | Array | np.ndarray) -> list[int]:
        if isinstance(latents, np.ndarray | Array):
            latents = np.asarray(latents).reshape(-1)
        for latent in latents:
            if not isinstance(latent, Integral) or not 0 <= latent < self.sae.latents:
                raise UserError(
                    f"there is no latent {latent!r}: ids are 0 to {self.sae.latents - 1}"
                )
        return [int(latent) for latent in latents]


def _filled(values: list, blank: int, dtype: DTypeLike) -> np.ndarray:
    """With blanks up to a power of two, so that few numbers of edits are compiled."""
    size = 1 << max(len(values) - 1, 0).bit_length()
    return np.array(values + [blank] * (size - len(values)), dtype)


def attach(
    lm: LanguageModel,
    sae: Autoencoder,
    params: Params,
    layer: int,
    *,
    max_norm: float = np.inf,
    masks: ActivationsConfig = ActivationsConfig(),
    bos: bool = True,
) -> Attached:
    """A handle on a language model with an autoencoder of the output of its block `layer`.

    Args:
      max_norm: activations with a larger norm are outliers.
      masks: whether position 0 and special tokens are left alone; nothing else of it is read.
      bos: whether texts start with BOS, as in training.

    Raises UserError for a layer that the model has not, or an autoencoder of another width.
    """
    if not isinstance(layer, Integral) or not 0 <= layer < lm.layers:
        raise UserError(f"{lm.name} has no layer {layer}: it has layers 0 to {lm.layers - 1}")
    if sae.width != lm.width:
        raise UserError(
            f"the autoencoder takes activations of width {sae.width}, those of {lm.name} have "
            f"{lm.width}: take the model that it was trained on"
        )
    masks = dataclasses.replace(masks, mask_padding=True)
    return Attached(lm, sae, params, layer, max_norm, masks, bos)


def attach_run(path: str | Path, step: int | str = "latest") -> Attached:
    """The language model and the autoencoder of a run's folder, attached.

    Left alone is what the evaluator leaves out, outliers among it: by the median norm in the run's
    store of activations, or else in its eval.json. With neither, nothing counts as an outlier.

    Args:
      path: the --workdir of a run. step: a checkpoint's step, 'latest' or 'best'.

    Raises UserError when the folder holds no run with a language model, or no such checkpoint.
    """
    workdir = local(path)
    config = read_config(workdir)
    if not config.lm.path:
        raise UserError(f"{workdir} was trained without a language model: there is none to attach")
    sae, params = load(workdir, step)
    return attach(
        load_language_model(config.lm),
        sae,
        params,
        config.lm.layer,
        max_norm=largest_evaluated(_median_norm(workdir, config), config.activations),
        masks=evaluated(config.activations),
        bos=config.text.bos,
    )


def _is_finite(multiple: Any) -> bool:
    """Whether it is one number that float32 holds."""
    number = isinstance(multiple, Real) or getattr(multiple, "shape", None) == ()
    with np.errstate(over="ignore"):
        return number and bool(np.isfinite(np.float32(multiple)))


def _median_norm(workdir: Path, config: Config) -> float:
    """Of the activations of a run, as its store or its evaluation tells; inf if neither does."""
    store, results = Path(config.activations.path or workdir / "activations"), workdir / "eval.json"
    if (store / MANIFEST).exists():
        return read_manifest(store).median_norm
    known = read_json(results, "a run that was evaluated") if results.exists() else {}
    median = known.get("median_norm")
    return median if isinstance(median, float) else np.inf
