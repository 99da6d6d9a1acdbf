"""The many-expert autoencoder: Scale SAE, and Switch SAE as one of its settings.

The module holds parameters and calls the pure functions of its neighbours, in the order of the
paper: route, encode with the selected experts, scale features, gate, select, decode.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.config import SAEConfig
from scale_sae_jax.sae import centring, decoding, kernels, routing, scaling, selection, start
from scale_sae_jax.sae.codes import Codes, Routing
from scale_sae_jax.sae.grouped import grouped_dot
from scale_sae_jax.sae.groups import Groups, group
from scale_sae_jax.sae.kernels import Kernel
from scale_sae_jax.sae.losses import Loss
from scale_sae_jax.sae.shards import Shards
from scale_sae_jax.sae.sparsity import count_slots


class Row(NamedTuple):
    """R tokens as this device's experts see them: without a mesh, the T tokens of the batch.

    x [R, D]. experts [R, E]: this device's number of each selected expert, N for one elsewhere.
    gates [R, E]: their weights. groups: the (token, expert) pairs by expert.
    """

    x: Float[Array, "R D"]
    experts: Int[Array, "R E"]
    gates: Float[Array, "R E"]
    groups: Groups


class ScaleSAE(nn.Module):
    """Parameters and forward passes (Scale SAE, arXiv 2511.05745, section 3).

    Parameters: w_enc [N, D, M], b_enc [N, M], w_dec [N, M, D], b_dec [D], w_router [D, N],
    c_router [N], b_router [D] (absent when biases are tied), omega [N] and low_pass [D, D] where
    feature scaling has them, scale [] (set once, at the start) with `input_scale`. Two follow the
    batches instead of a gradient: threshold [] of scope 'batch', and balance [N] where
    `balance_rate` is set.

    With `shards`, methods run on each device of a mesh, inside `jax.shard_map`: on T of the batch's
    tokens, and with N / shards.expert of the experts in the parameters `by_expert`.
    """

    revives = True
    by_expert = ("w_enc", "b_enc", "w_dec", "omega")

    config: SAEConfig
    width: int
    shards: Shards = Shards()

    def setup(self):
        c, d = self.config, self.width
        here, m = self.shards.local(c.experts), c.latents // c.experts
        zeros = nn.initializers.zeros
        self.w_enc = self.param("w_enc", start.uniform_encoder, here, d, m)
        self.w_dec = self.param(
            "w_dec", lambda _: start.normalise(self.w_enc.swapaxes(1, 2), c.decoder_norm)
        )
        self.b_enc = (
            self.param("b_enc", zeros, (here, m)) if c.encoder_bias else jnp.zeros((here, m))
        )
        self.b_dec = self.param("b_dec", zeros, (d,))
        self.w_router = self.param("w_router", nn.initializers.lecun_uniform(), (d, c.experts))
        self.c_router = self.param("c_router", zeros, (c.experts,))
        self.b_router = self.b_dec if c.tie_biases else self.param("b_router", zeros, (d,))
        if c.feature_scaling != "none":
            self.omega = self.param("omega", zeros, (here,))
        if c.feature_scaling == "mean_lp":
            self.low_pass = self.param("low_pass", lambda _: jnp.eye(d))
        if c.input_scale:
            self.scale = self.param("scale", nn.initializers.ones, ())
        if c.topk_scope == "batch":
            self.threshold = self.param("threshold", zeros, ())
        if c.balance_rate:
            self.balance = self.param("balance", zeros, (c.experts,))

    def start(self, x: Float[Array, "T D"]) -> dict[str, Array]:
        """Starting values that depend on the first batch."""
        centre = start.geometric_median(x)
        begun = {"b_dec": centre}
        if not self.config.tie_biases:
            begun["b_router"] = centre.copy()
        if self.config.input_scale:
            begun["scale"] = start.coordinate_scale(x - centre)
        return begun

    @property
    def unit(self) -> Float[Array, ""] | float:
        """What activations are divided by; no gradient changes it."""
        return jax.lax.stop_gradient(self.scale) if self.config.input_scale else 1.0

    @property
    def sparse_codes(self) -> bool:
        """Whether a token has k slots; else one for every latent of its experts."""
        return self.config.topk_scope != "batch"

    @property
    def kernel(self) -> Kernel:
        return kernels.choose(self.config.kernel, self.shards.expert)

    def route(self, x: Float[Array, "T D"]) -> Routing:
        balance = self.balance if self.config.balance_rate else None
        x, b_router = x / self.unit, self.b_router / self.unit
        return routing.route(
            x, b_router, self.w_router, self.c_router, self.config.active, balance
        )

    def dispatch(self, x: Float[Array, "T D"], routed: Routing) -> Row:
        """Brings tokens to the experts of all devices that could be theirs."""
        here = self.shards.local(self.config.experts)
        mine = x, routed.experts, routing.gates(routed, self.config.gate)
        x, experts, gates = self.shards.gather(mine)
        local = experts - self.shards.first(self.config.experts)
        experts = jnp.where((local >= 0) & (local < here), local, here)
        return Row(x, experts, gates, group(experts, here))

    def acts(self, row: Row) -> Float[Array, "R E M"]:
        """ReLU((x - b_dec) W^_i + c_i) of the selected experts, gated where the gate stands here.

        0 for experts on other devices. `shift` is 0 and carries the gradient of b_dec; see
        `centring`.
        """
        c, experts = self.config, row.experts
        b_dec = self.b_dec / self.unit
        centred = row.x / self.unit - jax.lax.stop_gradient(b_dec)
        products = grouped_dot(centred, self.w_enc, row.groups, self.kernel, c.dtype)  # [R, E, M]
        shift = centring.shift(b_dec, self.w_enc)  # [N, M]
        if c.feature_scaling != "none":
            along, along_shift = self.along_low_pass(centred, b_dec, products, shift, experts)
            products = scaling.scale_features(products, self.omega[experts], along)
            shift = scaling.scale_features(shift, self.omega, along_shift)
        acts = jax.nn.relu(products + (self.b_enc + shift)[experts])
        if self.shards.expert > 1:
            acts = jnp.where((experts < self.w_enc.shape[0])[..., None], acts, 0)
        return acts if c.gate_at == "output" else acts * row.gates[..., None]

    def along_low_pass(
        self,
        centred: Float[Array, "R D"],
        b_dec: Float[Array, " D"],
        products: Float[Array, "R E M"],
        shift: Float[Array, "N M"],
        experts: Int[Array, "R E"],
    ) -> tuple[Float[Array, "R E"], Float[Array, " N"]]:
        """What `products` and `shift` are along the low-pass direction a_i."""
        kind = self.config.feature_scaling
        if kind == "gain":
            return jnp.zeros(experts.shape), jnp.zeros(shift.shape[0])
        if kind == "mean":
            return products.mean(-1), shift.mean(-1)
        direction = scaling.low_pass(self.w_enc, self.low_pass)  # [N, D]
        along = jnp.take_along_axis(centred @ direction.T, experts, axis=-1, mode="clip")
        return along, -direction @ centring.offset(b_dec)

    def weighted(self, codes: Codes, row: Row) -> Codes:
        """Survivors in the unit of x, times their expert's gate where that stands at the output."""
        codes = codes._replace(values=codes.values * self.unit)
        if self.config.gate_at == "code":
            return codes
        expert = codes.ids // self.w_enc.shape[2]  # [R, K]
        belongs = expert[..., None] == row.experts[:, None, :]  # [R, K, E]
        weight = jnp.where(belongs, row.gates[:, None], 0).sum(-1)
        return codes._replace(values=codes.values * weight)

    def survivors(self, acts: Float[Array, "R E M"], row: Row, training: bool) -> Codes:
        c, experts = self.config, row.experts
        if c.topk_scope == "token":
            return selection.per_token(acts, experts, c.k, row.groups, self.shards)
        if c.topk_scope == "expert":
            return selection.per_expert(acts, experts, c.k)
        if training:
            return selection.per_batch(acts, experts, c.k, self.shards)
        return selection.over_threshold(acts, experts, self.threshold)

    def encode(self, x: Float[Array, "T D"]) -> Codes:
        row = self.dispatch(x, self.route(x))
        codes = self.weighted(self.survivors(self.acts(row), row, training=False), row)
        if self.shards.expert == 1:
            return codes
        first = self.shards.first(self.config.experts) * self.w_enc.shape[2]
        ids = jnp.where(codes.values != 0, codes.ids + first, 0)
        return Codes(*self.shards.sum_to_owner((codes.values, ids)))  # a slot is used by one device

    def decode(self, codes: Codes) -> Float[Array, "T D"]:
        rows = self.decoder()
        values, ids = self.shards.gather(codes)
        ids = ids - self.shards.first(self.config.experts) * self.w_enc.shape[2]
        values = jnp.where((ids >= 0) & (ids < rows.shape[0]), values, 0)
        decoded = decoding.decode_rows(values, ids, rows, self.config.dtype)
        return self.shards.sum_to_owner(decoded) + self.b_dec

    def decoder(self) -> Float[Array, "L D"]:
        return self.w_dec.reshape(-1, self.width)

    def squared_error(
        self, target: Float[Array, "T D"], codes: Codes, row: Row
    ) -> tuple[Float[Array, ""], Float[Array, "T D"]]:
        """mean_t |target - decoded|^2 over the whole batch, and this device's target - decoded."""
        dtype = self.config.dtype
        error, residual = decoding.squared_error(
            target, codes, row.experts, self.w_dec, row.groups, self.kernel, dtype, self.shards
        )
        return self.shards.mean(error), residual

    def loss(self, x: Float[Array, "T D"], dead: Bool[Array, " L"] | None) -> Loss:
        """mean |x - x^|^2 + alpha d N sum_i f_i P_i (+ AuxK).

        Args:
          dead: latents that AuxK revives, [N * M] by id; None where there are none.
        """
        c, shards = self.config, self.shards
        routed = self.route(x)
        row = self.dispatch(x, routed)
        acts = self.acts(row)
        survivors = self.survivors(acts, row, training=True)
        codes = self.weighted(survivors, row)
        mse, residual = self.squared_error(x - self.b_dec, codes, row)
        balance = routing.load_balance(routed, self.width, c.load_balance_from, shards)
        load = routing.expert_share(routed, "selected", shards)
        auxk = jnp.zeros(())
        if c.auxk and dead is not None:
            slots = min(c.auxk_latents or self.width // 2, acts.shape[1] * acts.shape[2])
            revived = selection.dead_codes(acts, row.experts, dead, slots, row.groups, shards)
            auxk, _ = self.squared_error(residual, self.weighted(revived, row), row)
            auxk = jnp.where(shards.total(dead.sum()) > 0, auxk, 0)
        tracked = {}
        if c.topk_scope == "batch":
            follow = selection.follow_threshold(self.threshold, survivors.values, shards)
            tracked["threshold"] = follow
        if c.balance_rate:
            tracked["balance"] = routing.rebalanced(self.balance, load, c.balance_rate)
        return Loss(
            total=mse + c.load_balance * self.unit**2 * balance + c.auxk_weight * auxk,
            mse=mse,
            terms={"load_balance": balance, "auxk": auxk},
            firing=shards.total_over_data(count_slots(codes, self.decoder().shape[0])),
            expert_load=load,
            tracked=tracked,
        )
