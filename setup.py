"""Packaging. `pip install .` for the library, `pip install .[test]` to run the tests.

CPU kernels are compiled where there is a C++ compiler, with headers of jaxlib (pyproject.toml).
"""

import re
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
SOURCES = ROOT / "scale_sae_jax/sae/cpp"
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "scale_sae_jax/__init__.py").read_text())[1]

jaxlib = find_spec("jaxlib")
kernels = Extension(
    "scale_sae_jax.sae._native",
    sorted(str(path.relative_to(ROOT)) for path in SOURCES.glob("*.cc")),
    depends=[str(path.relative_to(ROOT)) for path in SOURCES.glob("*.h")],
    include_dirs=[str(Path(jaxlib.origin).parent / "include")] if jaxlib else [],
    extra_compile_args=["-O3", "-g0", "-std=c++17"],
    language="c++",
    optional=True,
)

setup(
    name="scale_sae_jax",
    version=VERSION,
    description="Many-expert sparse autoencoders (Scale SAE, Switch SAE) in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["scale_sae_jax", "scale_sae_jax.*"]),
    ext_modules=[kernels] if jaxlib else [],
    package_data={"scale_sae_jax.report.dashboard": ["static/*"]},
    install_requires=[
        "absl-py>=2.1",
        "datasets>=4.0",
        "filelock>=3.15",
        "flax>=0.12",
        "huggingface_hub>=1.0",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "ml_collections>=1.1",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "pyarrow>=20",
        "safetensors>=0.5",
        "scipy>=1.13",
        "tensorboardX>=2.6",
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "test": [
            "beartype>=0.20",
            "gguf>=0.17",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "selenium>=4.20",
            "torch==2.13.0",
        ],
        "peers": ["eai-sparsify>=1.3", "sae-lens>=6.54", "torch>=2.9"],
        "sae_lens": ["sae-lens>=6.54", "torch>=2.9"],
        "torch": ["torch>=2.9"],
        "plot": ["matplotlib>=3.9"],
        "wandb": ["wandb"],
        "gpu": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
    },
)
