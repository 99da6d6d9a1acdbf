"""What only GPUs run: the top-k, interpreted, and whether all programs can be lowered for CUDA.

Values and gradients of the kernels are tested where those of the others are (test_grouped.py,
test_gathered.py, test_mesh.py, test_together.py).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from scale_sae_jax.errors import UserError
from scale_sae_jax.sae import build, kernels, triton
from scale_sae_jax.sae.presets import PRESETS, preset
from scale_sae_jax.sae.selection import top_k, winners_first

WIDTH = 32
EXPERTS = {"paper": 2, "authors": 2, "ours": 2, "switch": 1}


@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 4), width=st.integers(2, 70), data=st.data())
def test_winners_and_their_order_are_those_of_top_k(tokens, width, data):
    """With many ties, zeros of both signs, infinities and NaN."""
    k = data.draw(st.integers(1, width))
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    pool = np.array([0, -0.0, 1, 1.5, -2, np.inf, -np.inf, np.nan, 1e-40, 3e38], np.float32)
    few, wide = rng.choice(pool, (tokens, width)), rng.standard_normal((tokens, width))
    values = few if data.draw(st.booleans()) else wide.astype(np.float32)
    ours, theirs = winners_first(jnp.asarray(values), k), jax.lax.top_k(values, k)
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[0], theirs[0])


def a_gpu():
    """From JAX 0.11 on, lowering asks which GPU it is for."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_gradient_lower_for_cuda(name, dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    active = EXPERTS.get(name, 1)
    config = preset(name, latents=512, experts=8 if name in EXPERTS else 1, active=active, k=4)
    sae = build(dataclasses.replace(config, dtype=dtype), WIDTH)
    x = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32)
    dead = jax.ShapeDtypeStruct((sae.latents,), bool)
    params = jax.eval_shape(sae.init, jax.random.key(0))

    def gradient(params, x, dead):
        return jax.grad(lambda p: sae.loss(p, x, dead).total)(params)

    with a_gpu():
        lowered = jax.jit(gradient).trace(params, x, dead).lower(lowering_platforms=("cuda",))
    many_or_sparse = name in EXPERTS or sae.sparse_codes
    assert ("triton" in lowered.as_text()) == (many_or_sparse or sae.revives)


def test_the_cpus_of_a_machine_with_a_gpu_can_be_asked_for(monkeypatch):
    """By another kernel; the top-k finds out itself."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sae = build(preset("paper", latents=512, experts=8, active=2, k=4), WIDTH)
    sae = build(dataclasses.replace(sae.config, kernel="loop"), WIDTH)
    x = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32)
    params = jax.eval_shape(sae.init, jax.random.key(0))
    jax.jit(sae.encode).trace(params, x).lower(lowering_platforms=("cpu",))


def test_a_jax_without_triton_is_enough(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(triton, "backend", None)
    monkeypatch.delitem(kernels.KERNELS, "triton")
    assert kernels.choose("auto") == kernels.KERNELS["tiles"]
    np.testing.assert_array_equal(top_k(jnp.asarray([[1.0, 3, 2]]), 2)[1], [[1, 2]])
    with pytest.raises(UserError, match="take 'auto'"):
        kernels.choose("triton")
