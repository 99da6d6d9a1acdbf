"""An autoencoder on a mesh: the same module, on each device's tokens and experts.

Its loss, codes and gradients are those of one device up to the order of sums. One dictionary lies
on every device, and only tokens are split.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from scale_sae_jax.errors import UserError
from scale_sae_jax.parallel.mesh import EVERYWHERE, ON_EXPERTS, TOKENS, param_specs
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.codes import Codes, Routing
from scale_sae_jax.sae.losses import Loss
from scale_sae_jax.sae.shards import DATA, EXPERT, Shards

# Arguments and results of the methods that run on each device, beside the parameters.
SPECS = {
    "loss": (
        (TOKENS, ON_EXPERTS),
        Loss(
            total=EVERYWHERE,
            mse=EVERYWHERE,
            terms=EVERYWHERE,
            firing=ON_EXPERTS,
            expert_load=EVERYWHERE,
            tracked=EVERYWHERE,
        ),
    ),
    "encode": ((TOKENS,), Codes(TOKENS, TOKENS)),
    "decode": ((Codes(TOKENS, TOKENS),), TOKENS),
    "route": ((TOKENS,), Routing(TOKENS, TOKENS, TOKENS)),
}


@dataclass(frozen=True)
class ShardedAutoencoder(Autoencoder):
    """An `Autoencoder` whose methods take and return arrays that lie on `mesh`.

    local: the module as it runs on each device.
    """

    mesh: Mesh
    local: nn.Module

    def _apply(self, params: Params, method: str, *args: Any) -> Any:
        if method not in SPECS:
            return super()._apply(params, method, *args)
        tokens = jax.tree.leaves(args[0])[0].shape[0]
        missing = -tokens % self.mesh.size
        if missing and method == "loss":  # a mean over the tokens, so none can be added
            raise UserError(
                f"a batch of {tokens} activations cannot be split over {self.mesh.size} devices: "
                f"take a multiple of {self.mesh.size}, or a smaller config.mesh"
            )
        if missing:
            filled = jax.tree.map(
                lambda a: jnp.pad(a, ((0, missing), *[(0, 0)] * (a.ndim - 1))), args
            )
            return jax.tree.map(lambda a: a[:tokens], self._apply(params, method, *filled))

        def on_device(params: Params, *args: Any) -> Any:
            return self.local.apply({"params": params}, *args, method=method)

        ins, outs = SPECS[method]
        specs = (param_specs(params, self.module.by_expert), *ins)
        # Values that are the same everywhere are so by construction, which JAX cannot see of
        # custom gradients; without its check it takes a sum over devices as its own gradient.
        mapped = jax.shard_map(
            on_device, mesh=self.mesh, in_specs=specs, out_specs=outs, check_vma=False
        )
        return mapped(params, *args)


def on_mesh(sae: Autoencoder, mesh: Mesh) -> Autoencoder:
    """The autoencoder on a mesh; as it is where that has one device."""
    if mesh.size == 1:
        return sae
    shards = Shards(mesh.shape[DATA], mesh.shape[EXPERT])
    local = sae.module.copy(shards=shards)
    fields = {field.name: getattr(sae, field.name) for field in dataclasses.fields(Autoencoder)}
    return ShardedAutoencoder(**fields, mesh=mesh, local=local)
