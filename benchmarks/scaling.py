"""What a training step needs of each device as devices are added: memory, arithmetic, traffic.

    python -m benchmarks.scaling --d=768 --latents=24576 --experts=64 --active=2 --k=32 --batch=4096

Compiles the step for 1, 2, 4 and 8 forced host devices, and runs nothing. One JSON line a mesh:

    argument_gb, temporary_gb   what XLA allots on a device, and `planned_gb`, what
                                experiments.plan predicts for their sum
    expert_state_gb             parameters and moments of experts on a device
    gflops, moved_gb            XLA's cost analysis of a device's program
    received_gb                 what it receives from other devices, and `planned_received_gb`

--weak multiplies the batch by the devices. XLA counts the body of a loop once: take --kernel=tiles,
which has no loop over experts but room for any load, to read an upper bound of the arithmetic.
`useful_gflops` is what a device does for its share of the tokens.
"""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.step import define_sizes
from experiments import command_line
from scale_sae_jax.config import CHOICES, OptimConfig
from scale_sae_jax.parallel.experts import on_mesh
from scale_sae_jax.parallel.mesh import DATA, EVERYWHERE, EXPERT, TOKENS, make_mesh
from scale_sae_jax.parallel.plan import plan
from scale_sae_jax.sae import build
from scale_sae_jax.sae.presets import preset
from scale_sae_jax.training import state
from scale_sae_jax.training.optim import optimiser, schedule
from scale_sae_jax.training.step import make_steps

FLAGS = flags.FLAGS
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "u8": 1, "u16": 2, "s8": 1}
COLLECTIVE = (
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def define(argv: list[str]) -> None:
    del argv
    define_sizes()
    flags.DEFINE_string("preset", "paper", "Options of the autoencoder.")
    flags.DEFINE_list("mesh", [], "Meshes instead of those by number: data:4/expert:2,expert:8.")
    flags.DEFINE_bool("weak", False, "A batch on each device instead of one in all.")
    flags.DEFINE_bool("auxk", False, "With the branch for dead latents.")
    flags.DEFINE_enum("kernel", "loop", CHOICES["sae.kernel"], "How experts are multiplied.")


def received(text: str) -> int:
    """Bytes that a device receives in all collectives of a compiled program, run once each."""
    total = 0
    for line in text.splitlines():
        found = re.search(COLLECTIVE, line)
        if not found:
            continue
        kinds = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
        size = sum(BYTES[kind] * math.prod(map(int, filter(None, dims.split(","))))
                   for kind, dims in kinds)
        groups = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", line)
        if groups is None:  # a permutation
            total += size
            continue
        others = (len(groups[1].split(",")) if groups[1] else int(groups[2])) - 1
        # A gather gives all parts, a scatter one of them; a sum over all is one of each.
        share = {"all-gather": others / (others + 1), "reduce-scatter": others,
                 "all-reduce": 2 * others / (others + 1)}
        total += int(size * share.get(found[2], 1))
    return total


def measure(spec: str, devices: int) -> dict[str, float | int | str]:
    """The line of one mesh."""
    sizes = {name: FLAGS[name].value for name in ("latents", "experts", "active", "k")}
    config = dataclasses.replace(
        preset(FLAGS.preset, **sizes), kernel=FLAGS.kernel, auxk=FLAGS.auxk
    )
    batch, adam = FLAGS.batch * (devices if FLAGS.weak else 1), OptimConfig()
    mesh = make_mesh(spec, config.experts, devices)
    sae = on_mesh(build(config, FLAGS.d), mesh)
    tx = optimiser(adam, sae.latents, 1000, config.decoder_norm)
    layout = state.layout(sae, tx, adam, mesh)
    steps = make_steps(
        sae, tx, schedule(adam, sae.latents, 1000), config.dead_after,
        (layout, NamedSharding(mesh, EVERYWHERE)),
    )
    x = jax.ShapeDtypeStruct(
        (1, batch, FLAGS.d), jnp.float32,
        sharding=NamedSharding(mesh, PartitionSpec(None, *TOKENS)),
    )
    mean = jax.ShapeDtypeStruct((FLAGS.d,), jnp.float32)
    start = state.abstract(sae, tx, adam, mesh)
    compiled = steps.lower(start, x, 1, mean).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    experts = [start.params, *(getattr(start.opt_state[2], name) for name in ("mu", "nu"))]
    planned = plan(config, adam, FLAGS.d, batch, 1, dict(mesh.shape))
    return {
        "mesh": f"data:{mesh.shape[DATA]},expert:{mesh.shape[EXPERT]}",
        "devices": devices,
        "batch": batch,
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "planned_gb": planned.bytes / 1e9,
        "expert_state_gb": sum(
            4 * math.prod(tree[name].sharding.shard_shape(tree[name].shape))
            for tree in experts for name in sae.module.by_expert if name in tree
        ) / 1e9,
        "gflops": cost["flops"] / 1e9,
        "useful_gflops": planned.flops / 1e9,
        "moved_gb": cost["bytes accessed"] / 1e9,
        "received_gb": received(compiled.as_text()) / 1e9,
        "planned_received_gb": planned.received / 1e9,
    }


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    meshes = [(spec.replace("/", ","), 8) for spec in FLAGS.mesh] or [
        (spec, n) for n in (1, 2, 4, 8) for spec in dict.fromkeys((f"expert:{n}", f"data:{n}"))
    ]
    for spec, devices in meshes:
        print(json.dumps(measure(spec, devices)), flush=True)


if __name__ == "__main__":
    command_line.start(main, define)
