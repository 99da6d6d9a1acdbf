"""The step benchmark as a user calls it, at a size that takes little time."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_together_is_measured_beside_alone():
    out = run("together", "--runs=2", "--repeats=1", "--presets=paper,topk").stdout
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["preset"], line["runs"]) for line in lines] == [("paper", 2), ("topk", 2)]
    for line in lines:
        ratio = line["s_per_step_together"] / (2 * line["s_per_step"])
        assert abs(line["ratio"] / ratio - 1) < 1e-6
