"""The benchmarks as a user calls them, at sizes that take little time."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.scaling import estimated_cycles, group_size
from scale_sae_jax.sae import kernels

ROOT = Path(__file__).parent.parent
SMALL = ("--d=8", "--latents=64", "--experts=8", "--active=2", "--k=4", "--batch=64")
ONCE = ("--repeats=1", "--steps_per_call=1")


def step(*flags):
    return run("step", *ONCE, *flags)


def run(name, *flags):
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_one_line_with_the_flops_of_the_active_experts():
    (line,) = map(json.loads, step().stdout.splitlines())
    assert line["flops_per_step"] == 10 * 64 * 2 * 8 * 8
    rate = line["flops_per_step"] / line["s_per_step"] / 1e9
    assert abs(line["mfu"] * line["matmul_gflops"] / rate - 1) < 1e-6
    assert abs(line["tok_per_s"] * line["s_per_step"] / 64 - 1) < 1e-6
    parts = ("s_forward_backward", "s_optimiser", "s_selection", "temporary_gb", "peak_rss_gb")
    assert all(line[name] > 0 for name in parts)


def test_sizes_that_do_not_fit_are_refused_in_a_line():
    refused = step("--k=20")
    assert refused.returncode == 2 and "--k=20 exceeds" in refused.stderr
    assert "Traceback" not in refused.stderr and not refused.stdout


def test_features_that_exceed_memory_are_refused_in_a_line():
    command = [sys.executable, "-m", "benchmarks.synthetic", "--features=100000000000"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "--features=100000000000 with" in refused.stderr
    assert "Traceback" not in refused.stderr and not refused.stdout


def test_together_is_measured_beside_alone():
    out = run("together", "--runs=2", "--repeats=1", "--presets=paper,topk").stdout
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["preset"], line["runs"]) for line in lines] == [("paper", 2), ("topk", 2)]
    for line in lines:
        ratio = line["s_per_step_together"] / (2 * line["s_per_step"])
        assert abs(line["ratio"] / ratio - 1) < 1e-6


def test_scaling_compiles_for_meshes_of_host_devices():
    out = run("scaling", "--mesh=expert:1", "--mesh=data:2,expert:2").stdout
    one, four = map(json.loads, out.splitlines())
    assert (one["devices"], four["devices"]) == (1, 4)
    assert four["mesh"] == "data:2,expert:2" and four["kernel"] == kernels.best("cpu")
    assert one["received_gb"] == 0 < four["received_gb"]
    assert abs(2 * four["expert_state_gb"] / one["expert_state_gb"] - 1) < 1e-6
    assert "planned_gb" in one and "estimated_mcycles" not in one


@pytest.mark.parametrize("groups, size", (
    ("replica_groups={{0,1,2},{3,4,5}}, dimensions={0}", 3),
    ("replica_groups=[4,2]<=[8], dimensions={0}", 2),
    ("replica_groups=mesh['data'=2,'expert'=4] {'expert'}, dimensions={0}", 4),
    ("replica_groups=mesh['data'=2,'expert'=4] {'data','expert'}, dimensions={0}", 8),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}", 2),
    ("dimensions={0}", 16),
))
def test_devices_of_a_collective(groups, size):
    assert group_size(f"%sum = f32[8] all-reduce(%x), {groups}", devices=16) == size


def test_a_topology_that_is_not_known_is_refused_in_a_line():
    refused = run("scaling", "--topology=v0:1x1")
    assert refused.returncode == 2 and "--topology=v0:1x1: " in refused.stderr
    assert "Traceback" not in refused.stderr and not refused.stdout


def test_estimates_count_loops_as_often_as_they_run_and_the_dearest_branch():
    def op(name, cycles):
        return f'  %{name} = f32[2] fusion(%x), backend_config={{"estimated_cycles":"{cycles}"}}'

    text = "\n".join([
        "%condition (p: s32[]) -> pred[] {", "  %bound = s32[]{:T(128)} constant(5)", "}",
        "%body.1 (p: s32[]) -> s32[] {", op("a", 10), op("b", 3), "}",
        "%unknown (p: s32[]) -> pred[] {", "  %c = pred[] compare(%p, %q)", "}",
        "%cheap (p: s32[]) -> s32[] {", op("c", 1), "}",
        "%dear (p: s32[]) -> s32[] {", op("d", 1000), "}",
        "ENTRY %main (p: s32[]) -> s32[] {",
        op("e", 100_000),
        "  %w = s32[] while(%t), condition=%condition, body=%body.1",
        "  %v = s32[] while(%t), condition=%unknown, body=%body.1",
        "  %i = s32[] conditional(%p, %q), branch_computations={%cheap, %dear}",
        "  %call = s32[] call(%q), to_apply=%cheap",
        "}",
    ])
    assert estimated_cycles(text) == 100_000 + 5 * 13 + 13 + 1000 + 1


@pytest.mark.skipif(not find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize("kernel", ("ragged", "tiles"))
def test_experts_that_were_not_chosen_cost_a_tpu_nothing(kernel):
    """Eight times as many experts of one size, by what the compiler says of a TPU's step."""
    flops = []
    for experts in (8, 64):
        flags = ("--d=256", f"--experts={experts}", f"--latents={experts * 128}", "--k=16",
                 "--batch=2048", "--topology=v5e:2x4", "--mesh=expert:1", f"--kernel={kernel}")
        (line,) = map(json.loads, run("scaling", *flags).stdout.splitlines())
        assert line["estimated_mcycles"] > 0
        flops.append(line["gflops"])
    assert flops[1] < 2 * flops[0]
