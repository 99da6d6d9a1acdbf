"""Tests run on 8 forced CPU devices, with every jaxtyping annotation checked by beartype.

They, and the commands that they start, reach no network, and compile what they share once, with few
optimisations, and on CPUs by XLA's older emitters in one piece, if it knows these flags: a fifth
less, where compile time is most of the run. (In several pieces, how the code of these emitters is
cut depends on the whole program, and sets how it rounds.) JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests
the program that users run; `make test` does so for the formulas, the memory they take and resuming.
"""

import os
import subprocess
import sys
import tempfile

FAST = {
    "HF_HUB_OFFLINE": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
for name, value in FAST.items():
    os.environ.setdefault(name, value)
OLDER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and "XLA_FLAGS" not in os.environ:
    probe = [sys.executable, "-c", "import jax; jax.devices()"]  # which an unknown flag ends
    settings = os.environ | {"XLA_FLAGS": OLDER, "JAX_PLATFORMS": "cpu"}
    known = subprocess.run(probe, env=settings, capture_output=True)
    if known.returncode == 0:
        os.environ["XLA_FLAGS"] = OLDER
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # as it is in the workers of pytest-xdist
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
install_import_hook("scale_sae_jax", "beartype.beartype")
