"""CPU kernels in C++: against NumPy where their blocks end, at once, on one thread, and without."""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import jax
import jaxlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_sae_jax.errors import UserError
from scale_sae_jax.sae import kernels, native

compiled = pytest.mark.skipif(not native.library, reason="no C++ compiler at installation")
scatter_columns = jax.jit(native.scatter_columns, static_argnums=4)
scatter = jax.jit(native.scatter, static_argnums=3)
grouped_dot = jax.jit(native.grouped_dot)
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


def products_setting(sizes, inner, width, spare=0, seed=0):
    """x [R, A], index [P], w [N, A, B], sizes [N], with so many pairs beyond all runs."""
    rng = np.random.default_rng(seed)
    x, w = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((7, inner), (len(sizes), inner, width))
    )
    index = rng.integers(-1, 8, sum(sizes) + spare).astype(np.int32)  # some lie beyond x
    return x, index, w, np.array(sizes, np.int32)


def products_by_numpy(x, index, w, sizes):
    expert = np.repeat(np.arange(len(sizes)), sizes)
    rows = x[np.clip(index[: len(expert)], 0, len(x) - 1)].astype(float)
    spare = np.zeros((len(index) - len(expert), w.shape[2]))
    return np.concatenate([np.einsum("pa,pab->pb", rows, w[expert]), spare])


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
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.sampled_from((0, 1, 2, 3, 5, 6, 7, 13, 95, 96, 97, 200)), max_size=4),
    inner=st.sampled_from((1, 127, 128, 129, 256, 300, 513)),
    width=st.sampled_from((1, 3, 8, 15, 16, 17, 31, 32, 33, 70)),
    spare=st.integers(0, 3),
)
def test_products_of_any_size(sizes, inner, width, spare):
    """Tiles of 6, 4, 2 and 1 rows, runs of 96, packed blocks, and what is left over."""
    setting = products_setting([*sizes, 1], inner, width, spare)
    expected = products_by_numpy(*setting)
    np.testing.assert_allclose(grouped_dot(*setting), expected, rtol=1e-5, atol=1e-4)


@compiled
def test_products_whose_sizes_are_wrong_stay_inside_their_arrays():
    x, index, w, _ = products_setting([3, 2], 5, 4)
    many, negative = np.array([4, 90], np.int32), np.array([-3, 5], np.int32)
    for sizes, meant in ((many, [4, 1]), (negative, [0, 5])):
        expected = products_by_numpy(x, index, w, meant)
        np.testing.assert_allclose(grouped_dot(x, index, w, sizes), expected, rtol=1e-5, atol=1e-5)


@compiled
def test_a_nan_reaches_only_the_products_of_its_row():
    x, index, w, sizes = products_setting([9, 20], 40, 33)
    x[3] = np.nan
    found = np.isnan(grouped_dot(x, index, w, sizes))
    np.testing.assert_array_equal(found, np.tile((index == 3)[:, None], 33))


@compiled
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
@pytest.mark.parametrize("most", (16, 32))
def test_narrower_vectors(most, tmp_path):
    """What processors without AVX-512 run, and without AVX2."""
    sources = sorted((Path(native.__file__).parent / "cpp").glob("*.cc"))
    headers = Path(jaxlib.__file__).parent / "include"
    command = ["c++", "-O1", "-std=c++17", "-fPIC", "-shared", f"-DMOST_BYTES={most}"]
    output = tmp_path / "narrow.so"
    subprocess.run([*command, "-isystem", headers, *sources, "-o", output], check=True)
    library = ctypes.CDLL(os.fspath(output))
    for name in native.HANDLERS:
        narrow = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f"{name}_{most}", narrow, platform="cpu")

    def compare(name, shapes, *arrays):
        results = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
        calls = [jax.ffi.ffi_call(each, results)(*arrays) for each in (f"{name}_{most}", name)]
        for narrow, wide in zip(*calls, strict=True):
            np.testing.assert_allclose(narrow, wide, rtol=1e-5, atol=1e-4)

    start, values, ids, x = setting(tokens=40, slots=5, width=300, experts=3, size=33)
    products = products_setting([100, 0, 17], 300, 70, spare=3)
    compare("scale_sae_grouped_dot", [(120, 70)], *products)
    compare("scale_sae_sum_and_dots", [x.shape, ids.shape], x, values, ids, start)
    compare("scale_sae_scatter", [(99, 300)], values, ids, x)
    compare("scale_sae_scatter_columns", [(3, 300, 33)], start, values, ids, x)


@compiled
@pytest.mark.parametrize("size, width", ((384, 768), (390, 772), (391, 701)))
def test_larger_than_caches(size, width):
    """Results that are written past the cache, if their rows are whole vectors of 4; else not."""
    experts = 31
    start, values, ids, x = setting(60, 5, width, experts, size)
    assert experts * size * width >= 8 << 20  # as in vectors.h
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
