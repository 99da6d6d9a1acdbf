"""What all autoencoders with one dictionary share: x^ = b_dec + f(x) W_dec.

An architecture is f and a loss. f sees z = (x - b_dec) / scale, whose coordinates have a mean
square of 1, so that biases and thresholds are numbers near 1 at any layer of any model; its values
times `scale` are the codes.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.config import SAEConfig
from scale_sae_jax.sae import centring, decoding, kernels, selection, start
from scale_sae_jax.sae.codes import Codes, Routing
from scale_sae_jax.sae.groups import group
from scale_sae_jax.sae.losses import Loss
from scale_sae_jax.sae.products import rounded_dot
from scale_sae_jax.sae.shards import Shards


class DictionarySAE(nn.Module):
    """Parameters: w_enc, w_dec [L, D], b_enc [L], b_dec [D], and scale [], set once at the start.

    With `l0`, that is the L0 asked for, in the place of config.k; see `Autoencoder.with_l0`.

    With `shards`, methods run on each device of a mesh, inside `jax.shard_map`, on T of the batch's
    tokens.

    An architecture adds `acts`, the latents of a token at inference, and `loss`.
    """

    config: SAEConfig
    width: int
    shards: Shards = Shards()
    l0: Int[Array, ""] | None = None

    by_expert = ()  # parameters whose leading axis is that of experts
    sparse_codes = False  # whether a token has k slots; else one for every latent
    revives = False  # whether the loss asks for dead latents (AuxK)
    options = ()  # of SAEConfig, that it has and not every architecture

    def setup(self):
        c, d = self.config, self.width
        zeros = nn.initializers.zeros
        self.w_enc = self.param(
            "w_enc", lambda key: start.uniform_encoder(key, 1, d, c.latents)[0].T
        )
        self.w_dec = self.param(
            "w_dec", lambda _: start.normalise(jnp.copy(self.w_enc), c.decoder_norm)
        )
        self.b_enc = (
            self.param("b_enc", zeros, (c.latents,)) if c.encoder_bias else jnp.zeros(c.latents)
        )
        self.b_dec = self.param("b_dec", zeros, (d,))
        self.scale = self.param("scale", nn.initializers.ones, ())

    def start(self, x: Float[Array, "T D"]) -> dict[str, Array]:
        """Starting values that depend on the first batch."""
        centre = start.geometric_median(x)
        return {"b_dec": centre, "scale": start.coordinate_scale(x - centre)}

    def start_level(self, x: Float[Array, "T D"], begun: dict[str, Array]) -> Float[Array, " L"]:
        """What each latent's product W_enc z exceeds in its share k / L of the first batch."""
        z = (x - begun["b_dec"]) / begun["scale"]
        return jnp.quantile(z @ self.w_enc.T, 1 - self.target / self.config.latents, axis=0)

    def start_bias(
        self, x: Float[Array, "T D"], begun: dict[str, Array]
    ) -> dict[str, Float[Array, " L"]]:
        """b_enc, if there is one, with which each latent fires for its share of the target L0."""
        return {"b_enc": -self.start_level(x, begun)} if self.config.encoder_bias else {}

    @property
    def target(self) -> Int[Array, ""] | int:
        """The L0 asked for."""
        return self.config.k if self.l0 is None else self.l0

    @property
    def unit(self) -> Float[Array, ""]:
        """`scale`, which no gradient changes."""
        return jax.lax.stop_gradient(self.scale)

    def centred(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return (x - jax.lax.stop_gradient(self.b_dec)) / self.unit

    def shift(self) -> Float[Array, " L"]:
        """0, with the gradient of b_dec in the encoder's products; see `centring`."""
        return -(self.w_enc @ centring.offset(self.b_dec)) / self.unit

    def products(self, x: Float[Array, "T D"]) -> Float[Array, "T L"]:
        """(x - b_dec) W_enc / scale."""
        return rounded_dot(self.centred(x), self.w_enc, self.config.dtype) + self.shift()

    def acts(self, x: Float[Array, "T D"]) -> Float[Array, "T L"]:
        raise NotImplementedError

    def loss(self, x: Float[Array, "T D"], dead: Bool[Array, " L"] | None) -> Loss:
        raise NotImplementedError

    def encode(self, x: Float[Array, "T D"]) -> Codes:
        return self.dense_codes(self.acts(x))

    def dense_codes(self, acts: Float[Array, "T L"]) -> Codes:
        return Codes(acts * self.unit, jnp.broadcast_to(jnp.arange(acts.shape[1]), acts.shape))

    def decode(self, codes: Codes) -> Float[Array, "T D"]:
        c = self.config
        kernel = kernels.choose(c.kernel)
        return decoding.decode(codes, self.w_dec, kernel, c.dtype) + self.b_dec

    def residual(
        self, x: Float[Array, "T D"], acts: Float[Array, "T L"], frozen: bool = False
    ) -> Float[Array, "T D"]:
        """x - x^ of dense latents.

        Args:
          frozen: let no gradient into the decoder and b_dec.
        """
        w_dec, b_dec = self.w_dec, self.b_dec
        if frozen:
            w_dec, b_dec = jax.lax.stop_gradient((w_dec, b_dec))
        return x - b_dec - rounded_dot(acts * self.unit, w_dec.T, self.config.dtype)

    def decoder(self) -> Float[Array, "L D"]:
        return self.w_dec

    def route(self, x: Float[Array, "T D"]) -> Routing:
        """The one expert that every token uses."""
        one = jnp.ones((x.shape[0], 1))
        return Routing(logits=0 * one, probs=one, experts=jnp.zeros(one.shape, jnp.int32))

    def squared_error(
        self, target: Float[Array, "T D"], codes: Codes, b_dec: Float[Array, " D"]
    ) -> tuple[Float[Array, ""], Float[Array, "T D"]]:
        """mean_t |target - b_dec - decoded|^2 of sparse codes over the whole batch, and this
        device's residual, a constant.
        """
        c, groups = self.config, group(self.route(target).experts, 1)
        kernel = kernels.one_expert(c.kernel)
        error, residual = decoding.squared_error(
            target, codes, codes.ids, self.w_dec[None], b_dec, groups, kernel, c.dtype
        )
        return self.shards.mean(error), residual

    def auxk(
        self,
        acts: Float[Array, "T L"],
        acts_at: Callable[[Int[Array, "T K"]], Float[Array, "T K"]],
        dead: Bool[Array, " L"] | None,
        residual: Float[Array, "T D"],
    ) -> Float[Array, ""]:
        """Error of the residual rebuilt by the largest dead latents (arXiv 2406.04093, A.2).

        `acts_at` gives the latents with some ids, with their gradient.
        """
        c = self.config
        if dead is None or not c.auxk:
            return jnp.zeros(())
        slots = min(c.auxk_latents or self.width // 2, c.latents)
        candidates = jnp.where(dead, jax.lax.stop_gradient(acts), 0)
        ids = selection.top_k(candidates, slots)[1]
        values = jnp.where(dead[ids], acts_at(ids), 0) * self.unit
        error, _ = self.squared_error(residual, Codes(values, ids), jnp.zeros(self.width))
        return jnp.where(dead.any(), error, 0)


