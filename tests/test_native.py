"""CPU kernels in C++: against NumPy where their blocks end, at once, on one thread, and without."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_sae_jax.errors import UserError
from scale_sae_jax.sae import kernels, native

compiled = pytest.mark.skipif(not native.library, reason="no C++ compiler at installation")
scatter_columns = jax.jit(native.scatter_columns, static_argnums=4)
scatter = jax.jit(native.scatter, static_argnums=3)
sum_and_dots = jax.jit(native.sum_and_dots)


def setting(tokens, slots, width, experts, size, seed=0):
    """start [N, D], values and ids [T, K], x [T, D]; some ids lie before the latents, or beyond."""
    rng = np.random.default_rng(seed)
    start, values, x = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((experts, width), (tokens, slots), (tokens, width))
    )
    ids = rng.integers(-2, experts * size + 2, (tokens, slots)).astype(np.int32)
    return start, values, ids, x


def by_numpy(start, values, ids, x, size):
    """[N, M, D], and `start` left out: [L, D]."""
    rows = np.zeros((start.shape[0] * size, x.shape[1]))
    inside = (ids >= 0) & (ids < len(rows))
    terms = values[..., None] * x[:, None].astype(float)
    np.add.at(rows, ids[inside], terms[inside])
    return start[:, None] + rows.reshape(len(start), size, -1), rows


def assert_sums_and_dots(start, values, ids, rows):
    """Ids beyond the rows are those of the last, and below of the first."""
    gathered = rows[np.clip(ids, 0, len(rows) - 1)].astype(float)
    total = start + np.einsum("tk,tkd->td", values, gathered)
    ours = sum_and_dots(start, values, ids, rows)
    np.testing.assert_allclose(ours[0], total, rtol=1e-5, atol=1e-4)
    dots = np.einsum("td,tkd->tk", total, gathered)
    np.testing.assert_allclose(ours[1], dots, rtol=1e-4, atol=1e-5 * ids.shape[1] * rows.shape[1])


@compiled
@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 40),
    slots=st.integers(1, 5),
    width=st.sampled_from((1, 15, 16, 17, 127, 128, 150, 300)),
    experts=st.integers(1, 4),
    size=st.sampled_from((1, 5, 31, 32, 33, 70)),
)
def test_columns_and_rows_of_any_size(tokens, slots, width, experts, size):
    """Parts of 128, 16 and 1 columns, blocks of 32 latents, and what is left over."""
    start, values, ids, x = setting(tokens, slots, width, experts, size)
    columns, rows = by_numpy(start, values, ids, x, size)
    ours = scatter_columns(start, values, ids, x, size)
    np.testing.assert_allclose(ours.swapaxes(1, 2), columns, rtol=1e-5, atol=1e-4)
    ours = scatter(values, ids, x, experts * size)
    np.testing.assert_allclose(ours, rows, rtol=1e-5, atol=1e-4)


@compiled
@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 40),
    slots=st.integers(1, 40),
    width=st.sampled_from((1, 15, 16, 17, 63, 64, 127, 128, 150, 300)),
)
def test_a_sum_and_its_dots_with_the_same_rows(tokens, slots, width):
    _, values, ids, start = setting(tokens, slots, width, experts=3, size=3)
    rows = np.random.default_rng(1).standard_normal((9, width)).astype(np.float32)
    assert_sums_and_dots(start, values, ids, rows)


@compiled
@pytest.mark.parametrize("size, width", ((384, 768), (390, 772), (391, 701)))
def test_larger_than_caches(size, width):
    """Results that are written past the cache, if their rows are whole vectors of 4; else not."""
    experts = 31
    start, values, ids, x = setting(60, 5, width, experts, size)
    assert experts * size * width >= 8 << 20  # as in native.cc
    columns, rows = by_numpy(start, values, ids, x, size)
    ours = scatter_columns(start, values, ids, x, size)
    np.testing.assert_allclose(ours.swapaxes(1, 2), columns, rtol=1e-5, atol=1e-4)
    ours = scatter(values, ids, x, experts * size)
    np.testing.assert_allclose(ours, rows, rtol=1e-5, atol=1e-4)
    assert_sums_and_dots(x, values, ids, columns.astype(np.float32).reshape(-1, width))


@compiled
def test_a_nan_reaches_only_the_latents_that_its_token_uses():
    start, values, ids, x = setting(tokens=9, slots=2, width=40, experts=2, size=8)
    x[3], ids[3] = np.nan, [5, 9]
    found = np.isnan(scatter_columns(start, values, ids, x, 8)).any(1).reshape(-1)
    np.testing.assert_array_equal(np.flatnonzero(found), [5, 9])


@compiled
def test_calls_at_once_neither_wait_for_each_other_nor_mix():
    """More of them than XLA has threads, each of which asks for all of these threads."""
    arguments = [setting(300, 8, 200, 4, 64, seed) for seed in range(24)]
    alone = [np.asarray(scatter_columns(*each, 64)) for each in arguments]
    with ThreadPoolExecutor(len(arguments)) as pool:
        for _ in range(5):
            together = pool.map(lambda each: np.asarray(scatter_columns(*each, 64)), arguments)
            for ours, expected in zip(together, alone, strict=True):
                np.testing.assert_array_equal(ours, expected)


@compiled
def test_the_bits_are_those_of_one_thread():
    """XLA has one where the process may use one core alone."""
    sums = (
        "import sys, os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import numpy as np; from tests.test_native import scatter_columns, setting\n"
        "columns = np.asarray(scatter_columns(*setting(500, 8, 200, 4, 64), 64))\n"
        "sys.stdout.buffer.write(columns.tobytes())"
    )
    one = subprocess.run([sys.executable, "-c", sums], capture_output=True, check=True).stdout
    ours = np.asarray(scatter_columns(*setting(500, 8, 200, 4, 64), 64))
    assert one == ours.tobytes()


@compiled
def test_under_vmap():
    several = [np.stack(each) for each in zip(*(setting(5, 2, 20, 2, 3, s) for s in range(3)))]
    ours = jax.vmap(lambda *each: native.scatter_columns(*each, 3))(*several)
    for at, each in enumerate(zip(*several)):
        expected = by_numpy(*each, 3)[0]
        np.testing.assert_allclose(ours[at].swapaxes(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("content", (None, b"no library"))
def test_what_cannot_be_loaded_is_not_there(content, tmp_path):
    if content:
        (tmp_path / ("_native" + EXTENSION_SUFFIXES[0])).write_bytes(content)
    assert native._load(tmp_path) is None


def test_without_a_compiler_cpus_take_the_loop(monkeypatch):
    monkeypatch.delitem(kernels.KERNELS, "native", raising=False)
    assert kernels.choose("auto") == kernels.KERNELS["loop"]
    with pytest.raises(UserError, match="'native', but it was not compiled .* take 'auto'"):
        kernels.choose("native")


@compiled
def test_elsewhere_it_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="it is for CPUs"):
        kernels.choose("native")
