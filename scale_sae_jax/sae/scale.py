"""The many-expert autoencoder: Scale SAE, and Switch SAE as one of its settings.

The module holds parameters and calls the pure functions of its neighbours, in the order of the
paper: route, encode with the selected experts, scale features, gate, select, decode.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scale_sae_jax.config import SAEConfig
from scale_sae_jax.sae import centring, decoding, kernels, routing, scaling, selection, start
from scale_sae_jax.sae.codes import Codes, Routing, Slots
from scale_sae_jax.sae.grouped import grouped_dot, grouped_dot_at
from scale_sae_jax.sae.groups import Groups, group
from scale_sae_jax.sae.kernels import Kernel
from scale_sae_jax.sae.lookup import lookup
from scale_sae_jax.sae.losses import Loss
from scale_sae_jax.sae.shards import Shards
from scale_sae_jax.sae.sparsity import count_slots


class Row(NamedTuple):
    """R tokens as this device's experts see them: without a mesh, the T tokens of the batch.

    x [R, D]: less b_dec, see `ScaleSAE.centred`. experts [R, E]: this device's number of each
    selected expert, N for one elsewhere. gates [R, E]: their weights. groups: the (token, expert)
    pairs by expert.
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

    With `l0`, so many of the k slots of a token are used; see `Autoencoder.with_l0`.

    With `shards`, methods run on each device of a mesh, inside `jax.shard_map`: on T of the batch's
    tokens, and with N / shards.expert of the experts in the parameters `by_expert`.
    """

    revives = True
    by_expert = ("w_enc", "b_enc", "w_dec", "omega")
    options = (
        "gate", "gate_at", "feature_scaling", "load_balance", "load_balance_from", "balance_rate",
        "input_scale", "tie_biases", "topk_scope", "auxk_weight", "auxk_latents",
    )

    config: SAEConfig
    width: int
    shards: Shards = Shards()
    l0: Int[Array, ""] | None = None

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

    def centred(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """(x - b_dec) / unit, with b_dec as a constant; see `centring`."""
        return (x - jax.lax.stop_gradient(self.b_dec)) / self.unit

    def route(self, x: Float[Array, "T D"]) -> Routing:
        return self.route_centred(self.centred(x))

    def route_centred(self, centred: Float[Array, "T D"]) -> Routing:
        """The routing of x, by x - b_router = (x - b_dec) + (b_dec - b_router)."""
        c, offset = self.config, jax.lax.stop_gradient(self.b_dec) - self.b_router
        balance = self.balance if c.balance_rate else None
        return routing.route(
            centred, offset / self.unit, self.w_router, self.c_router, c.active, balance
        )

    def dispatch(self, centred: Float[Array, "T D"], routed: Routing) -> Row:
        """Brings tokens to the experts of all devices that could be theirs."""
        here = self.shards.local(self.config.experts)
        mine = centred, routed.experts, routing.gates(routed, self.config.gate)
        x, experts, gates = self.shards.gather(mine)
        local = experts - self.shards.first(self.config.experts)
        experts = jnp.where((local >= 0) & (local < here), local, here)
        return Row(x, experts, gates, group(experts, here))

    def latents(
        self, row: Row
    ) -> tuple[Float[Array, "R E M"], Callable[..., list[Float[Array, "R K"]]]]:
        """ReLU((x - b_dec) W^_i + c_i) of the selected experts, gated where the gate stands here.

        Returns all of them, and a function from `Slots`, one or several, to the latents in each.
        Take gradients through the function: where codes are sparse, it is that of K products a
        token, and nothing dense is kept for it.
        """
        c, experts = self.config, row.experts
        here, _, size = self.w_enc.shape
        products = grouped_dot(row.x, self.w_enc, row.groups, self.kernel, c.dtype)  # [R, E, M]
        bias, omega = self.bias(), self.scaling_of(experts)

        def act(products, low, omega, bias, gates):
            if c.feature_scaling != "none":
                products = scaling.scale_features(products, omega, low)
            acts = jax.nn.relu(products + bias)
            return acts if c.gate_at == "output" else acts * gates

        low = self.along_low_pass(row, products.mean(-1))
        of_latents = lookup(bias, experts, self.kernel)
        acts = act(products, low[..., None], omega[..., None], of_latents, row.gates[..., None])
        if self.shards.expert > 1:
            acts = jnp.where((experts < here)[..., None], acts, 0)

        def of_acts(slots: Slots) -> Float[Array, "R K"]:
            flat = acts.reshape(acts.shape[0], -1)
            at = slots.places
            return flat if at is None else jnp.take_along_axis(flat, at, axis=-1, mode="clip")

        def of_products(slots: Slots) -> Float[Array, "R K"]:
            constant = jax.lax.stop_gradient(products)
            found, means = grouped_dot_at(
                row.x, self.w_enc, constant, slots.places, row.groups, self.kernel, c.dtype
            )
            of_pairs = self.along_low_pass(row, means), omega, row.gates
            low, omegas, gates = (_of_pairs(values, slots) for values in of_pairs)
            return act(found, low, omegas, lookup(bias.reshape(-1), slots.ids, self.kernel), gates)

        def act_at(*several: Slots) -> list[Float[Array, "R K"]]:
            if self.sparse_codes:
                found = _in_one_call(of_products, several)
            else:
                found = [of_acts(slots) for slots in several]
            return [jnp.where(s.kept, f, 0) for s, f in zip(several, found, strict=True)]

        return acts, act_at

    def bias(self) -> Float[Array, "N M"]:
        """c_i, and a 0 that carries the gradient of b_dec in the products; see `centring`."""
        b_dec = self.b_dec / self.unit
        shift = centring.shift(b_dec, self.w_enc)
        kind = self.config.feature_scaling
        if kind == "none":
            return self.b_enc + shift
        if kind == "gain":
            along = jnp.zeros(shift.shape[0])
        elif kind == "mean":
            along = shift.mean(-1)
        else:
            along = -scaling.low_pass(self.w_enc, self.low_pass) @ centring.offset(b_dec)
        return self.b_enc + scaling.scale_features(shift, self.omega[:, None], along[:, None])

    def scaling_of(self, experts: Int[Array, "R E"]) -> Float[Array, "R E"]:
        """omega_i of each selected expert."""
        if self.config.feature_scaling == "none":
            return jnp.zeros(experts.shape)
        return lookup(self.omega, experts, self.kernel)

    def along_low_pass(self, row: Row, means: Float[Array, "R E"]) -> Float[Array, "R E"]:
        """x . a_i, with the low-pass direction of each selected expert; `means` of its products."""
        kind = self.config.feature_scaling
        if kind in ("none", "gain"):
            return jnp.zeros(means.shape)
        if kind == "mean":
            return means
        directions = scaling.low_pass(self.w_enc, self.low_pass)  # [N, D]
        return jnp.take_along_axis(row.x @ directions.T, row.experts, axis=-1, mode="clip")

    def slots(self, places: Int[Array, "R K"], row: Row) -> Slots:
        """The slots at `places`; E * m, or the place of an expert elsewhere, leaves one unused."""
        here, _, size = self.w_enc.shape
        pair = places // size
        expert = jnp.take_along_axis(row.experts, pair, axis=-1, mode="fill", fill_value=here)
        return Slots(places, expert < here, pair, expert, expert * size + places % size)

    def every_slot(self, kept: Bool[Array, "R W"], row: Row) -> Slots:
        """A slot for each latent of the selected experts."""
        here, _, size = self.w_enc.shape
        pair = jnp.broadcast_to(jnp.arange(kept.shape[1]) // size, kept.shape)
        expert = jnp.repeat(row.experts, size, axis=-1)
        return Slots(None, kept, pair, expert, expert * size + jnp.arange(kept.shape[1]) % size)

    def survivors(self, acts: Float[Array, "R E M"], row: Row, training: bool) -> Slots:
        """The slots of the latents that survive, by `topk_scope`."""
        c, acts = self.config, jax.lax.stop_gradient(acts)
        if c.topk_scope == "token":
            slots = self.slots(selection.per_token(acts, c.k, row.groups, self.shards), row)
            return self.fewer(slots, runs=1)
        if c.topk_scope == "expert":
            return self.fewer(self.slots(selection.per_expert(acts, c.k), row), runs=c.active)
        flat = acts.reshape(acts.shape[0], -1)
        if training:
            kept = selection.per_batch(flat, c.k, self.shards, self.l0)
            return self.every_slot(kept, row)
        return self.every_slot(flat > self.threshold, row)

    def fewer(self, slots: Slots, runs: int) -> Slots:
        """Of k slots, in as many runs of falling value, those of the first `l0`."""
        if self.l0 is None:
            return slots
        rank = jnp.arange(self.config.k) % (self.config.k // runs)
        return slots._replace(kept=slots.kept & (rank < self.l0 // runs))

    def revived(self, acts: Float[Array, "R E M"], dead: Bool[Array, " L"], row: Row) -> Slots:
        """Slots of the largest dead latents of each token (AuxK, arXiv 2406.04093, appendix A.2).

        Latents of experts that a token does not use are not computed for it, so they cannot be
        revived by it. `dead` marks the latents of this device's experts.
        """
        c, (_, active, size) = self.config, acts.shape
        most = min(c.auxk_latents or self.width // 2, active * size)
        asleep = dead.reshape(-1, size)[row.experts]
        candidates = jnp.where(asleep, jax.lax.stop_gradient(acts), 0)
        slots = self.slots(selection.per_token(candidates, most, row.groups, self.shards), row)
        return slots._replace(kept=slots.kept & dead[slots.ids])

    def codes(self, values: Float[Array, "R K"], slots: Slots, row: Row) -> Codes:
        """Values in the unit of x, times their expert's gate where that stands at the output."""
        values = values * self.unit
        if self.config.gate_at == "output":
            values = values * _of_pairs(row.gates, slots)
        return Codes(values, slots.ids)

    def encode(self, x: Float[Array, "T D"]) -> Codes:
        centred = self.centred(x)
        row = self.dispatch(centred, self.route_centred(centred))
        acts, act_at = self.latents(row)
        slots = self.survivors(acts, row, training=False)
        codes = self.codes(*act_at(slots), slots, row)
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
        decoded = decoding.decode_rows(values, ids, rows, self.kernel, self.config.dtype)
        return self.shards.sum_to_owner(decoded) + self.b_dec

    def decoder(self) -> Float[Array, "L D"]:
        return self.w_dec.reshape(-1, self.width)

    def squared_error(
        self,
        target: Float[Array, "T D"],
        codes: Codes,
        slots: Slots,
        row: Row,
        b_dec: Float[Array, " D"],
    ) -> tuple[Float[Array, ""], Float[Array, "T D"]]:
        """mean_t |target - b_dec - decoded|^2 over the whole batch, and this device's residual."""
        dtype, shards = self.config.dtype, self.shards
        error, residual = decoding.squared_error(
            target, codes, slots.places, self.w_dec, b_dec, row.groups, self.kernel, dtype, shards
        )
        return shards.mean(error), residual

    def loss(self, x: Float[Array, "T D"], dead: Bool[Array, " L"] | None) -> Loss:
        """mean |x - x^|^2 + alpha d N sum_i f_i P_i (+ AuxK).

        Args:
          dead: latents that AuxK revives, [L] by id; None where there are none.
        """
        c, shards = self.config, self.shards
        centred = self.centred(x)
        routed = self.route_centred(centred)
        row = self.dispatch(centred, routed)
        acts, act_at = self.latents(row)
        slots = self.survivors(acts, row, training=True)
        revived = [self.revived(acts, dead, row)] if c.auxk and dead is not None else []
        values, *again = act_at(slots, *revived)
        codes = self.codes(values, slots, row)
        mse, residual = self.squared_error(x, codes, slots, row, self.b_dec)
        balance = routing.load_balance(routed, self.width, c.load_balance_from, shards)
        load = routing.expert_share(routed, "selected", shards)
        auxk = jnp.zeros(())
        for found, places in zip(again, revived, strict=True):
            codes_again = self.codes(found, places, row)
            auxk, _ = self.squared_error(residual, codes_again, places, row, jnp.zeros(self.width))
            auxk = jnp.where(shards.total(dead.sum()) > 0, auxk, 0)
        tracked = {}
        if c.topk_scope == "batch":
            follow = selection.follow_threshold(self.threshold, values, shards)
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


def _of_pairs(values: Float[Array, "R E"], slots: Slots) -> Float[Array, "R K"]:
    """The value of each slot's expert; 0 for none. Sums, which are faster than gathering."""
    belongs = slots.pair[..., None] == jnp.arange(values.shape[1])
    return jnp.where(belongs, values[:, None], 0).sum(-1)


def _in_one_call(
    function: Callable[[Slots], Float[Array, "R K"]], several: tuple[Slots, ...]
) -> list[Float[Array, "R K"]]:
    """function(slots) for each of several, whose gradients come from one product then."""
    ends = np.cumsum([slots.kept.shape[1] for slots in several])[:-1]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *several)
    return jnp.split(function(joined), ends, axis=1)
