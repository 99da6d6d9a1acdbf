"""What a training step needs of each device as devices are added: memory, arithmetic, traffic.

    python -m benchmarks.scaling --d=768 --latents=24576 --experts=64 --active=2 --k=32 --batch=4096
    pip install libtpu && python -m benchmarks.scaling --topology=v5e:2x4

Compiles the step for 1, 2, 4 and 8 devices, and runs nothing: forced host devices, or TPU chips of
a --topology, which need not be there. One JSON line a mesh:

    argument_gb, temporary_gb   what XLA allots on a device, and `planned_gb`, what
                                experiments.plan predicts for their sum (many-expert ones alone)
    expert_state_gb             parameters and moments of experts on a device
    gflops, moved_gb            XLA's cost analysis of a device's program
    received_gb                 what it receives from other devices, and `planned_received_gb`
    estimated_mcycles           of a TPU's step, by its compiler, which has no estimate for gathers,
                                scatters, sorts and ragged products: to compare programs by

--weak multiplies the batch by the devices. XLA counts the body of a loop once: take --kernel=tiles,
which has no loop over experts but room for any load, to read an upper bound of the arithmetic.
`useful_gflops` is what a device does for its share of the tokens.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.step import define_sizes
from experiments import command_line
from scale_sae_jax.config import OptimConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.parallel.experts import on_mesh
from scale_sae_jax.parallel.mesh import DATA, EVERYWHERE, EXPERT, TOKENS, make_mesh
from scale_sae_jax.parallel.plan import plan
from scale_sae_jax.sae import build, kernels
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
    flags.DEFINE_multi_string("mesh", [], "A mesh, data:4,expert:2, instead of those by number.")
    flags.DEFINE_bool("weak", False, "A batch on each device instead of one in all.")
    flags.DEFINE_bool("auxk", False, "With the branch for dead latents.")
    flags.DEFINE_string("topology", None, "Kind and grid of TPU chips to compile for: v5e:2x4.")
    flags.DEFINE_enum("kernel", None, list(kernels.KERNELS), "Kernel in the platform's place.")


def chips(topology: str) -> Sequence[jax.Device]:
    """The devices of a TPU topology, to compile for. Raises UserError if libtpu has none such."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to wait for
    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # whatever the plugin raises
        raise UserError(
            f"--topology={topology}: {str(error).splitlines()[0]}; it takes a grid of chips such "
            "as v5e:2x4, and libtpu (pip install libtpu)"
        ) from None


def estimated_cycles(text: str) -> int:
    """The TPU compiler's estimates for all instructions of a compiled program, summed.

    A loop counts as often as it says, or once; of a conditional, the dearest branch.
    """
    computations = r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$\n((?:.*\n)*?)\}"
    bodies = {name: lines.splitlines() for name, lines in re.findall(computations, text, re.M)}

    @cache
    def cycles(name: str) -> int:
        return sum(map(of_instruction, bodies.get(name, ())))

    def of_instruction(line: str) -> int:
        if " while(" in line:
            condition, body = re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", line).groups()
            bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[condition]))
            return int(bounds[0] if len(bounds) == 1 else 1) * cycles(body)
        if " conditional(" in line:
            branches = re.search(r"branch_computations=\{(.*?)\}", line)[1]
            return max(cycles(branch.strip("% ")) for branch in branches.split(","))
        if called := re.search(r" call\(.*to_apply=%?([\w.-]+)", line):
            return cycles(called[1])
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        return int(estimate[1]) if estimate else 0

    return cycles(re.search(r"^ENTRY %?([\w.-]+) ", text, re.M)[1])


def group_size(line: str, devices: int) -> int:
    """Devices that take part together in the collective of this line of a compiled program.

    XLA writes {{0,1},{2,3}}, [2,2], or, from JAX 0.11 on, mesh['data'=2,'expert'=2] {'expert'}.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if of_mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", of_mesh[1]))
        return math.prod(int(sizes[axis]) for axis in of_mesh[2].split(","))
    return devices


def received(text: str, devices: int) -> int:
    """Bytes that a device receives in all collectives of a compiled program, run once each."""
    total = 0
    for line in text.splitlines():
        found = re.search(COLLECTIVE, line)
        if not found:
            continue
        kinds = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
        size = sum(BYTES[kind] * math.prod(map(int, filter(None, dims.split(","))))
                   for kind, dims in kinds)
        if found[2] == "collective-permute":
            total += size
            continue
        others = group_size(line, devices) - 1
        # A gather gives all parts, a scatter one of them; a sum over all is one of each.
        share = {"all-gather": others / (others + 1), "reduce-scatter": others,
                 "all-reduce": 2 * others / (others + 1)}
        total += int(size * share.get(found[2], 1))
    return total


def measure(spec: str, devices: Sequence[jax.Device]) -> dict[str, float | int | str]:
    """The line of one mesh."""
    sizes = {name: FLAGS[name].value for name in ("latents", "experts", "active", "k")}
    platform = "tpu" if FLAGS.topology else "cpu"
    config = dataclasses.replace(
        preset(FLAGS.preset, **sizes),
        kernel=FLAGS.kernel or kernels.best(platform), auxk=FLAGS.auxk,
    )
    mesh = make_mesh(spec, config.experts, devices)
    batch, adam = FLAGS.batch * (mesh.size if FLAGS.weak else 1), OptimConfig()
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
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    experts = [start.params, *(getattr(start.opt_state[2], name) for name in ("mu", "nu"))]
    line = {
        "mesh": f"data:{mesh.shape[DATA]},expert:{mesh.shape[EXPERT]}",
        "devices": mesh.size,
        "kernel": config.kernel,
        "batch": batch,
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "expert_state_gb": sum(
            4 * math.prod(tree[name].sharding.shard_shape(tree[name].shape))
            for tree in experts for name in sae.module.by_expert if name in tree
        ) / 1e9,
        "gflops": cost["flops"] / 1e9,
        "moved_gb": cost["bytes accessed"] / 1e9,
        "received_gb": received(text, mesh.size) / 1e9,
    }
    planned = plan(sae.config, adam, FLAGS.d, batch, 1, dict(mesh.shape))
    line["planned_received_gb"] = planned.received / 1e9
    if sae.module.by_expert:
        line |= {"planned_gb": planned.bytes / 1e9, "useful_gflops": planned.flops / 1e9}
    if FLAGS.topology:
        line["estimated_mcycles"] = estimated_cycles(text) / 1e6
    return line


def main() -> None:
    if not FLAGS.topology:
        jax.config.update("jax_num_cpu_devices", 8)
    devices = chips(FLAGS.topology) if FLAGS.topology else jax.devices()
    meshes = [(spec, len(devices)) for spec in FLAGS.mesh] or [
        (spec, n) for n in (1, 2, 4, 8) if n <= len(devices)
        for spec in dict.fromkeys((f"expert:{n}", f"data:{n}"))
    ]
    for spec, count in meshes:
        print(json.dumps(measure(spec, devices[:count])), flush=True)


if __name__ == "__main__":
    command_line.start(main, define)
