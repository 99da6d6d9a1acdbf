"""The mesh of devices, and what lies where on it.

Two axes, whatever their sizes: tokens are split over both, `data` and `expert`; the parameters,
moments and counters of experts are split over `expert`; everything else is on every device.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scale_sae_jax.config import Config
from scale_sae_jax.errors import UserError
from scale_sae_jax.sae.shards import DATA, EXPERT

TOKENS = PartitionSpec((DATA, EXPERT))  # rows [T, ...] of a batch
ON_EXPERTS = PartitionSpec(EXPERT)  # leading axis in the order of experts
EVERYWHERE = PartitionSpec()


def make_mesh(spec: str, experts: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `config.mesh` describes.

    Args:
      spec: 'data:4,expert:2'; one size may be -1, which takes the devices that are left, and an
        axis that is not named has size 1. '' puts experts on as many devices as divide both.
      experts: N.
      devices: those there are; those of this program if not given.

    Raises UserError: not such a text, or sizes that the devices or experts do not allow.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = parse_mesh(spec, experts, count)
    if sizes[DATA] * sizes[EXPERT] == count:
        used = devices
    elif jax.process_count() == 1:
        used = (devices or jax.devices())[: sizes[DATA] * sizes[EXPERT]]
    else:
        raise UserError(
            f"config.mesh = '{spec}' takes {sizes[DATA] * sizes[EXPERT]} of the {count} devices: "
            "with several processes it must take all; let one axis be -1"
        )
    return jax.make_mesh(
        (sizes[DATA], sizes[EXPERT]), (DATA, EXPERT), (AxisType.Auto,) * 2, devices=used
    )


def local_mesh(most: int | None = None) -> Mesh:
    """The devices of this process, `most` at most, along `data`."""
    devices = jax.local_devices()[:most]
    return jax.make_mesh((len(devices), 1), (DATA, EXPERT), (AxisType.Auto,) * 2, devices=devices)


def mesh_of_run(config: Config, experts: int) -> Mesh:
    """The mesh of a run. Raises UserError as `make_mesh`, or if batches cannot be split over it."""
    mesh = make_mesh(config.mesh, experts)
    check_batch(config.batch_size, mesh.size)
    return mesh


def check_batch(batch_size: int, devices: int) -> None:
    """Raises UserError if batches cannot be split evenly."""
    if batch_size % devices:
        raise UserError(
            f"config.batch_size = {batch_size} cannot be split over {devices} devices: "
            f"take {-(-batch_size // devices) * devices}, or a smaller config.mesh"
        )


def parse_mesh(spec: str, experts: int, devices: int) -> dict[str, int]:
    """Sizes of both axes on so many devices; see `make_mesh`."""
    if not spec:
        shards = math.gcd(experts, devices)
        return {DATA: devices // shards, EXPERT: shards}
    sizes = {}
    for part in spec.split(","):
        axis, _, size = part.partition(":")
        if axis not in (DATA, EXPERT) or axis in sizes or not size.removeprefix("-").isdecimal():
            raise UserError(f"config.mesh = '{spec}' is not understood: write data:4,expert:2")
        sizes[axis] = int(size)
    sizes = {DATA: 1, EXPERT: 1} | sizes
    known = math.prod(size for size in sizes.values() if size != -1)
    if min(sizes.values()) < -1 or known == 0 or list(sizes.values()).count(-1) > 1:
        raise UserError(f"config.mesh = '{spec}': sizes are at least 1, and one of them may be -1")
    sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    if not 1 <= math.prod(sizes.values()) <= devices:
        raise UserError(f"config.mesh = '{spec}' does not fit {devices} devices: lower its sizes")
    if experts % sizes[EXPERT]:
        raise UserError(
            f"config.mesh = '{spec}': {experts} experts cannot be split over {sizes[EXPERT]} "
            f"devices: take expert:{math.gcd(experts, sizes[EXPERT])}"
        )
    return sizes


def param_specs(params: Any, by_expert: tuple[str, ...]) -> Any:
    """Where each leaf of a tree of parameters, or of moments that mirror it, lies."""

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        name = getattr(path[-1], "key", None) if path else None
        return ON_EXPERTS if name in by_expert and leaf.ndim else EVERYWHERE

    return jax.tree_util.tree_map_with_path(spec, params)


def model_specs(params: Any, mesh: Mesh, split: bool) -> Any:
    """Where a language model's parameters lie: on every device, or each split over all of them.

    A split array is cut along its longest axis that the devices divide; one without any is not.
    """

    def spec(leaf: Any) -> PartitionSpec:
        even = [n if n % mesh.size == 0 else 0 for n in leaf.shape]
        if not split or not any(even):
            return EVERYWHERE
        axis = even.index(max(even))
        return PartitionSpec(*[None] * axis, (DATA, EXPERT))

    return jax.tree.map(spec, params)


def placed(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings on the mesh in the place of specs."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
