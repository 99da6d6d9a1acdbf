"""The handle users hold: an architecture's module with `params` as an explicit first argument."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.config import SAEConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.codes import Codes, Routing
from scale_sae_jax.sae.losses import Loss, orthogonality, variance

Params = Any  # a pytree of arrays
AnyArray = Array | np.ndarray


@dataclass(frozen=True)
class Autoencoder:
    """A sparse autoencoder of activations with D = `width` coordinates.

    All methods are pure functions of `params` and their arrays, and can be used inside `jax.jit`,
    `jax.grad` and `jax.vmap`. Many have gradients of their own, so `jax.jvp` is refused by JAX.
    Activations are floats [..., D], NumPy or JAX, taken as float32 (`config.dtype` may round the
    operands of products); codes are sparse: `Codes`. No activations, [0, D], have no codes, [0, K].
    """

    module: nn.Module
    config: SAEConfig
    width: int

    @property
    def experts(self) -> int:
        return self.config.experts

    @property
    def active(self) -> int:
        return self.config.active

    @property
    def latents(self) -> int:
        return self.config.latents

    @property
    def k(self) -> int:
        return self.config.k

    @property
    def sparse_codes(self) -> bool:
        """Whether codes have k slots, so that decoding reads k rows; else all active latents."""
        return self.module.sparse_codes

    @property
    def revives(self) -> bool:
        """Whether the loss of a batch depends on which latents are dead (AuxK)."""
        return self.module.revives and self.config.auxk

    def init(self, key: Array, first_batch: Float[Array, "T D"] | None = None) -> Params:
        """Fresh parameters; some, such as b_dec, start from values of `first_batch`."""
        params = self.module.init(key, method="decoder")["params"]
        if first_batch is None:
            return params
        return params | self._apply(params, "start", self._rows(first_batch))

    def encode(self, params: Params, x: Float[AnyArray, "*T D"]) -> Codes:
        """Sparse codes of x, K slots each."""
        codes = self._by_row(params, "encode", self._rows(x))
        return Codes(*(part.reshape(*np.shape(x)[:-1], part.shape[-1]) for part in codes))

    def decode(self, params: Params, codes: Codes) -> Float[Array, "*T D"]:
        """Activations from codes: b_dec + sum of value * decoder row."""
        *leading, slots = codes.values.shape
        rows = Codes(*(jnp.asarray(part).reshape(-1, slots) for part in codes))
        return self._by_row(params, "decode", rows).reshape(*leading, self.width)

    def reconstruct(self, params: Params, x: Float[AnyArray, "*T D"]) -> Float[Array, "*T D"]:
        """decode(encode(x))."""
        return self.decode(params, self.encode(params, x))

    def route(self, params: Params, x: Float[AnyArray, "*T D"]) -> Routing:
        """Router probabilities and the selected experts."""
        routed = self._by_row(params, "route", self._rows(x))
        return Routing(*(part.reshape(*np.shape(x)[:-1], part.shape[-1]) for part in routed))

    def decoder(self, params: Params) -> Float[Array, "L D"]:
        """Decoder rows in the order of global latent ids."""
        return self._apply(params, "decoder")

    def loss(
        self,
        params: Params,
        x: Float[AnyArray, "T D"],
        dead: Bool[AnyArray, " L"] | None,
        key: Array | None = None,
    ) -> Loss:
        """The training loss of one batch and its parts.

        Args:
          dead: latents that AuxK revives, by global id; None where there are none.
          key: deals the chunks of the orthogonality penalty; needed where that is on.
        """
        c, x = self.config, self._rows(x)
        loss = self._apply(params, "loss", x, None if dead is None else jnp.asarray(dead))
        if not c.orthogonality:
            return loss
        term = orthogonality(self.decoder(params), key, c.orthogonality_chunk)
        return loss._replace(
            total=loss.total + c.orthogonality * variance(x) * term,
            terms=loss.terms | {"orthogonality": term},
        )

    def with_l0(self, l0: Int[Array, ""]) -> "Autoencoder":
        """The same with an L0 of `l0` <= k, which may be known to the compiled program only.

        Its codes keep their k slots, of which `l0` are used.
        """
        return dataclasses.replace(self, module=self.module.copy(l0=l0))

    def n_params(self, params: Params) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    def _rows(self, x: Float[AnyArray, "*T D"]) -> Float[Array, "T D"]:
        """x as float32 [T, D]; raises UserError when D is not the autoencoder's width."""
        if np.shape(x)[-1:] != (self.width,):
            raise UserError(
                f"activations of shape {np.shape(x)} do not end in the {self.width} coordinates "
                "that this autoencoder takes"
            )
        return jnp.asarray(x, jnp.float32).reshape(-1, self.width)

    def _by_row(self, params: Params, method: str, rows: Any) -> Any:
        """Arrays [T, ...] from a pytree of arrays [T, ...], T = 0 included."""
        if jax.tree.leaves(rows)[0].shape[0]:
            return self._apply(params, method, rows)
        # Modules take one row at least: a row of zeros gives the shapes, and is cut away.
        blank = jax.tree.map(lambda part: jnp.zeros((1, *part.shape[1:]), part.dtype), rows)
        return jax.tree.map(lambda part: part[:0], self._apply(params, method, blank))

    def _apply(self, params: Params, method: str, *args: Any) -> Any:
        return self.module.apply({"params": params}, *args, method=method)
