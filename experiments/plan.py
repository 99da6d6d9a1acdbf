"""Will it fit, and what travels: the needs of a training step on a mesh, without running it.

    python -m experiments.plan --config=configs/owt.py:l0=32 --mesh=data:4,expert:2 --memory_gb=16

Prints what each device holds, and what it receives from the others in a step, by the formulas of
docs/scaling.md. If that is more than --memory_gb, says what to change. Needs no devices, and no
model where --d gives the width of the activations (GPT-2 small: --d=768).

Exit status: 0 it fits, 1 it does not, 2 for a user's mistake.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator

from absl import flags

from experiments import command_line
from scale_sae_jax.activations.array import map_array
from scale_sae_jax.config import Config, from_config_dict
from scale_sae_jax.errors import UserError
from scale_sae_jax.files import local
from scale_sae_jax.lm import inspect_language_model
from scale_sae_jax.parallel.mesh import check_batch, parse_mesh
from scale_sae_jax.parallel.plan import Plan, plan
from scale_sae_jax.sae.registry import build
from scale_sae_jax.sae.shards import DATA, EXPERT
from scale_sae_jax.training.loop import longest_call

FLAGS = flags.FLAGS
READ_AHEAD = 2  # the batches of a call, and those of the next one


def define(argv: list[str]) -> None:
    command_line.define_config(argv)
    flags.DEFINE_string("mesh", "", "Mesh, such as data:4,expert:2; config.mesh if not given.")
    flags.DEFINE_integer("devices", 0, "Devices, for a mesh that does not say how many.",
                         lower_bound=0)
    flags.DEFINE_float("memory_gb", 16.0, "Memory of a device.", lower_bound=0.001)
    flags.DEFINE_integer("d", 0, "Width of the activations, in the place of the model's.",
                         lower_bound=0)


def width_of(config: Config) -> int:
    """D, from the flag, the synthetic settings, the array's header or the model's config file."""
    if FLAGS.d or config.synthetic.features:
        return FLAGS.d or config.synthetic.d
    if config.activations.is_array:
        return map_array(local(config.activations.path)).shape[1]
    try:
        return inspect_language_model(config.lm).width
    except UserError as error:
        raise UserError(f"{error}, or the width alone with --d (GPT-2 small: --d=768)") from None


def mesh_of(config: Config, experts: int) -> dict[str, int]:
    """Sizes of both axes."""
    spec = FLAGS.mesh or config.mesh
    sizes = [int(size) for size in spec.replace(",", ":").split(":")[1::2] if size.isdecimal()]
    if not FLAGS.devices and (not spec or "-1" in spec):
        raise UserError("the mesh does not say how many devices there are: add --devices=N")
    return parse_mesh(spec, experts, FLAGS.devices or math.prod(sizes))


def needs(config: Config, width: int, mesh: dict[str, int]) -> Plan:
    sae = build(config.sae, width).config
    batches = READ_AHEAD * longest_call(config)
    return plan(sae, config.optim, width, config.batch_size, batches, mesh)


def remedies(config: Config, mesh: dict[str, int], experts: int) -> Iterator[tuple[str, tuple]]:
    """Changes to try, the least costly first, as a flag and (config, mesh)."""
    few = dataclasses.replace(config, steps_per_call=1)
    yield "--config.steps_per_call=1", (few, mesh)
    low = dataclasses.replace(config.optim, moment_dtype="bfloat16", param_dtype="bfloat16")
    yield ("--config.optim.moment_dtype=bfloat16 --config.optim.param_dtype=bfloat16",
           (dataclasses.replace(few, optim=low), mesh))
    expert = 2 * mesh[EXPERT]
    while experts % expert == 0:
        more = {DATA: mesh[DATA], EXPERT: expert}
        yield f"--config.mesh=data:{mesh[DATA]},expert:{expert}", (config, more)
        expert *= 2
    batch = config.batch_size // 2
    while batch >= mesh[DATA] * mesh[EXPERT]:
        yield f"--config.batch_size={batch}", (dataclasses.replace(config, batch_size=batch), mesh)
        batch //= 2


def main() -> None:
    config = from_config_dict(FLAGS.config)
    width = width_of(config)
    experts = build(config.sae, width).experts
    mesh = mesh_of(config, experts)
    devices = math.prod(mesh.values())
    check_batch(config.batch_size, devices)
    if not math.isfinite(FLAGS.memory_gb):
        raise UserError(f"--memory_gb={FLAGS.memory_gb} must be a number of GB, such as 80")
    found = needs(config, width, mesh)
    print(f"mesh data:{mesh[DATA]},expert:{mesh[EXPERT]}: {devices} devices, "
          f"{experts // mesh[EXPERT]} of {experts} experts and {config.batch_size // devices:,} of "
          f"{config.batch_size:,} activations on each")
    print("\nmemory of a device             GB")
    for name, size in (*found.memory.items(), ("all", found.bytes)):
        print(f"  {name:<24} {size / 1e9:8.3f}")
    print("\nreceived by a device a step    MB")
    for name, size in (*found.traffic.items(), ("all", found.received)):
        print(f"  {name:<24} {size / 1e6:8.2f}" if len(name) <= 24 else
              f"  {name} {size / 1e6:.2f}")
    print(f"\nuseful arithmetic of a device a step: {found.flops / 1e9:,.1f} GFLOP")
    if found.bytes <= FLAGS.memory_gb * 1e9:
        print(f"fits: {found.bytes / 1e9:.2f} of {FLAGS.memory_gb:g} GB")
        return
    print(f"does not fit: {found.bytes / 1e9:.2f} of {FLAGS.memory_gb:g} GB")
    for change, (other, on) in remedies(config, mesh, experts):
        size = needs(other, width, on).bytes
        if size <= FLAGS.memory_gb * 1e9:
            print(f"fits with {change}: {size / 1e9:.2f} GB")
            break
    else:
        print("no single change makes it fit: split experts over more devices, with more experts")
    sys.exit(1)


if __name__ == "__main__":
    command_line.start(main, define)
