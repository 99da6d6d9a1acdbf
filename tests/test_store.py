"""The store on disk and arrays made by others."""

import dataclasses
import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import ml_dtypes
import numpy as np
import pytest

from scale_sae_jax import sources
from scale_sae_jax.activations import store
from scale_sae_jax.activations.array import CHUNK_ROWS, open_array
from scale_sae_jax.config import ActivationsConfig, Config, TextConfig
from scale_sae_jax.console import Console
from scale_sae_jax.errors import UserError

D = 6


def make_store(folder, dtype="bfloat16", sizes=(5, 3, 4)):
    """A complete store of normal numbers, and the numbers."""
    folder.mkdir(exist_ok=True)
    x = np.random.default_rng(0).normal(size=(sum(sizes), D)).astype(np.float32)
    bits = x if dtype == "float32" else x.astype(ml_dtypes.bfloat16).view(np.uint16)
    parts = np.split(bits, np.cumsum(sizes)[:-1])
    shards = tuple(store.write_shard(folder, i, part) for i, part in enumerate(parts))
    counts = store.Counts(tokens_seen=len(x) + 8, padding=8, kept=len(x))
    manifest = store.Manifest("tiny", {}, "f" * 64, dtype, D, 1.5, counts, shards, complete=True)
    store.write_array(folder / store.MEAN, x.mean(axis=0))
    store.write_array(folder / store.DOCUMENTS, np.array([3, 2**64 - 1], np.uint64))
    store.write_manifest(folder, manifest)
    return x


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_across_shards(tmp_path, dtype):
    x = make_store(tmp_path, dtype)
    opened = store.open_store(tmp_path)
    ids = np.array([11, 0, 4, 5, 5, 7, 8, 2])
    expected = x[ids] if dtype == "float32" else x.astype(ml_dtypes.bfloat16)[ids].astype("f4")
    got = opened.rows(ids)
    assert got.dtype == np.float32
    assert (got == expected).all()
    assert (opened.n, opened.d, opened.median_norm) == (12, D, 1.5)
    assert (opened.mean == x.mean(axis=0)).all()
    assert opened.documents().tolist() == [3, 2**64 - 1]
    assert opened.rows(ids[:0]).shape == (0, D)
    for bad in ([12], [-1]):
        with pytest.raises(IndexError):
            opened.rows(np.array(bad))


def test_a_store_of_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    x = make_store(tmp_path, "float32", sizes=(1,) * 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(store, "_allow_open", lambda files: None)
            with pytest.raises(UserError, match="Too many open files; allow more") as caught:
                store.open_store(tmp_path)
            assert "delete" not in str(caught.value)
        opened = store.open_store(tmp_path)
        assert (opened.rows(np.arange(400)) == x).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_bfloat16_survives():
    bits = np.arange(2**16, dtype=np.uint16).reshape(-1, 2)
    expected = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    got = store.to_float32(bits)
    assert np.array_equal(got, expected, equal_nan=True)
    assert (np.signbit(got) == np.signbit(expected)).all()


def test_reads_from_many_threads(tmp_path):
    make_store(tmp_path)
    opened = store.open_store(tmp_path)
    ids = [np.random.default_rng(i).integers(0, 12, 50) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(opened.rows, ids))
    assert all((a == opened.rows(b)).all() for a, b in zip(together, ids, strict=True))


def test_manifest_survives_the_disk(tmp_path):
    make_store(tmp_path)
    manifest = store.read_manifest(tmp_path)
    store.write_manifest(tmp_path, manifest)
    assert store.read_manifest(tmp_path) == manifest
    assert not list(tmp_path.glob(".*"))


def change_manifest(folder, **changes):
    path = folder / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def append(path):
    path.write_bytes(path.read_bytes() + b"x")


def promise(path, shape):
    """A .npy file whose header announces more than there is."""
    with path.open("wb") as file:
        fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, fields)


def archive(path):
    with path.open("wb") as file:
        np.savez(file, np.zeros(D, np.float32))


def shard(file="shard-00000.npy", rows=12):
    return [{"file": file, "rows": rows, "sha256": ""}]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_manifest(f, complete=False), "did not finish"),
        (lambda f: change_manifest(f, format=2), "format 2"),
        (lambda f: change_manifest(f, extra=1), "not a manifest"),
        (lambda f: change_manifest(f, shards=shard(rows=-12)), "make no sense"),
        (lambda f: change_manifest(f, shards=shard(file="../shard-00000.npy")), "make no sense"),
        (lambda f: change_manifest(f, shards=shard()), "not a bfloat16 array"),
        (lambda f: change_manifest(f, dtype="float64"), "make no sense"),
        (lambda f: change_manifest(f, dtype=[]), "make no sense|not a manifest"),
        (lambda f: change_manifest(f, fingerprint=3), "make no sense|not a manifest"),
        (lambda f: change_manifest(f, d="6"), "make no sense|not a manifest"),
        (lambda f: change_manifest(f, d=7), "not a bfloat16 array"),
        (lambda f: (f / store.MANIFEST).write_text("{"), "not a manifest"),
        (lambda f: (f / store.MANIFEST).write_text("[" * 100_000), "not a manifest"),
        (lambda f: (f / store.MANIFEST).unlink(), "holds no activations"),
        (lambda f: (f / "shard-00001.npy").unlink(), "shard-00001.npy is damaged: it is missing"),
        (lambda f: truncate(f / "shard-00001.npy"), "not a whole .npy file"),
        (lambda f: append(f / "shard-00001.npy"), "size differs"),
        (lambda f: np.save(f / "shard-00001.npy", np.array([{}])), "not a whole .npy file"),
        (lambda f: np.save(f / store.MEAN, np.zeros(2, np.float32)), "not a float32 array of 6"),
        (lambda f: promise(f / store.MEAN, (10**14,)), "mean.npy is damaged: it is not a whole"),
        (lambda f: promise(f / store.MEAN, (10**30,)), "mean.npy is damaged: it is not a whole"),
        (lambda f: archive(f / store.MEAN), "mean.npy is damaged: it is not a whole"),
    ],
)
def test_a_damaged_store_is_refused(tmp_path, damage, message):
    make_store(tmp_path)
    store.open_store(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        store.open_store(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"dtype": []}, {"fingerprint": 3}, {"note": None}])
def test_values_of_a_wrong_type_make_no_sense(tmp_path, change):
    """As they come from a file where no annotation is checked."""
    make_store(tmp_path)
    manifest = store.read_manifest(tmp_path)
    assert store._is_sound(manifest)
    for name, value in change.items():
        object.__setattr__(manifest, name, value)
    assert not store._is_sound(manifest)


def test_hashes_of_no_document_and_of_too_many(tmp_path):
    make_store(tmp_path)
    store.write_array(tmp_path / store.DOCUMENTS, np.zeros(0, np.uint64))
    assert store.open_store(tmp_path).documents().shape == (0,)
    promise(tmp_path / store.DOCUMENTS, (10**14,))
    with pytest.raises(UserError, match="documents.npy is damaged: it is not a whole"):
        store.load_documents(tmp_path)


def test_verify_finds_a_flipped_bit(tmp_path):
    make_store(tmp_path)
    path = tmp_path / "shard-00001.npy"
    steps = []
    store.verify(store.open_store(tmp_path), lambda *step: steps.append(step))
    rows = [shard.rows for shard in store.open_store(tmp_path).manifest.shards]
    assert steps == [(done, sum(rows)) for done in np.cumsum(rows)]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard-00001.npy is damaged: its checksum"):
        store.verify(store.open_store(tmp_path))


def test_a_run_compares_the_store_that_it_finds_with_its_checksums(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    folder.mkdir()
    make_store(folder)
    monkeypatch.setattr(sources, "load_language_model", lambda config: None)
    monkeypatch.setattr(sources, "harvest", lambda *_: None)
    config = Config(activations=ActivationsConfig(path=str(folder)))

    def opened():
        return sources.open_sources(config, tmp_path, Event(), Console()).train.n

    n = opened()
    path = folder / "shard-00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard-00001.npy is damaged: its checksum"):
        opened()
    (tmp_path / "checkpoints").mkdir()  # of a run that has trained, it was compared before
    assert opened() == n


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_array(tmp_path, dtype):
    n = CHUNK_ROWS + 500
    x = np.random.default_rng(0).normal(1, 2, size=(n, D)).astype(dtype)
    np.save(tmp_path / "a.npy", x)
    train, heldout = open_array(tmp_path / "a.npy", 0.1)
    assert (train.n, heldout.n, train.d) == (n - int(n * 0.1), int(n * 0.1), D)
    ids = np.array([0, train.n - 1, 7, 7])
    assert (train.rows(ids) == x[ids].astype(np.float32)).all()
    assert train.rows(ids).dtype == np.float32
    assert (heldout.rows(np.array([0])) == x[train.n].astype(np.float32)).all()
    exact = x[: train.n].astype(np.float64)
    assert train.mean == pytest.approx(exact.mean(axis=0), rel=1e-6)
    assert train.median_norm == pytest.approx(np.median(np.linalg.norm(exact, axis=1)), rel=1e-6)
    assert (heldout.mean == train.mean).all()
    with pytest.raises(IndexError):
        train.rows(np.array([train.n]))


@pytest.mark.parametrize("scale", [1e4, 1e15])
def test_outliers_of_an_array_are_left_out_of_training(tmp_path, scale):
    n = 2 * CHUNK_ROWS
    x = np.random.default_rng(0).normal(1, 2, size=(n, D)).astype(np.float32)
    training = n - int(n * 0.1)
    far = [0, 1, 7, CHUNK_ROWS, training - 1]
    x[[*far, n - 1]] *= np.float32(scale)
    np.save(tmp_path / "a.npy", x)
    train, heldout = open_array(tmp_path / "a.npy", 0.1, max_norm_ratio=10.0)
    kept = np.delete(x[:training], far, axis=0)
    assert (train.n, heldout.n) == (len(kept), n - training)
    assert (train.rows(np.arange(train.n)) == kept).all()
    assert (train.rows(np.array([train.n - 1, 0, 0])) == kept[[-1, 0, 0]]).all()
    with pytest.raises(IndexError):
        train.rows(np.array([train.n]))
    assert (heldout.rows(np.arange(heldout.n)) == x[training:]).all()  # the evaluator counts them
    assert train.mean == pytest.approx(kept.mean(axis=0, dtype=np.float64), rel=1e-6)
    assert (heldout.mean == train.mean).all()
    norms = np.linalg.norm(x[:training].astype(np.float64), axis=1)
    assert train.median_norm == heldout.median_norm == pytest.approx(np.median(norms), rel=1e-6)
    for no_limit in (0.0, -1.0):
        train, _ = open_array(tmp_path / "a.npy", 0.1, no_limit)
        assert train.n == training and (train.rows(np.arange(9)) == x[:9]).all()


def test_a_run_leaves_outliers_of_its_array_out_as_its_settings_say(tmp_path):
    x = np.random.default_rng(0).normal(size=(200, D)).astype(np.float32)
    x[5] *= 1e4
    np.save(tmp_path / "a.npy", x)
    for ratio, n in ((10.0, 179), (0.0, 180)):
        activations = ActivationsConfig(path=f"{tmp_path}/a.npy", max_norm_ratio=ratio)
        config = Config(activations=activations, text=TextConfig(heldout_fraction=0.1))
        assert sources.open_sources(config, tmp_path, Event(), Console()).train.n == n


def test_a_ratio_that_leaves_no_row_of_an_array_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1, 20 * D + 1, dtype=np.float32).reshape(20, D) + 1e3)
    with pytest.raises(UserError, match="max_norm_ratio = 0.5 leaves none of 18 rows"):
        open_array(tmp_path / "a.npy", 0.1, max_norm_ratio=0.5)


def bad_row(row, value):
    x = np.ones((CHUNK_ROWS + 100, 2), np.float32)
    x[row, 1] = value
    return x


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((10, 2, 2), np.float32), r"shape \(10, 2, 2\)"),
        (np.ones(10, np.float32), r"must be \[n, d\] float16 or float32"),
        (np.ones((10, 2)), "float64"),
        (np.ones((10, 2), ">f4"), ">f4"),
        (np.ones((10, 2), np.int32), "int32"),
        (np.ones((10, 0), np.float32), r"shape \(10, 0\)"),
        (np.ones((10, 1), np.float32), "d at least 2"),
        (np.zeros((20, 2), np.float32), "its 18 rows to train on are all the same"),
        (np.full((20, 2), 3.0, np.float32), "its 18 rows to train on are all the same"),
        (np.eye(20, dtype=np.float32) * 1e-25, "multiply the array by a number"),
        (np.eye(20, dtype=np.float32) * 1e25, "inf in the median .*: multiply the array"),
        (np.asfortranarray(np.ones((10, 2), np.float32)), "Fortran"),
        (np.array([[{}]]), "not a plain .npy array"),
        (np.ones((3, 2), np.float32), "leaves 3 to train on and 0 to evaluate"),
        (bad_row(CHUNK_ROWS + 7, np.nan), f"row {CHUNK_ROWS + 7} holds NaN"),
        (bad_row(5, -np.inf), "row 5 holds NaN or infinity"),
    ],
)
def test_a_bad_array_is_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        open_array(tmp_path / "a.npy", 0.1)


def test_zeros_do_not_make_outliers_of_all_else(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(20, 6, dtype=np.float32))
    with pytest.raises(UserError, match="more than half of its 18 rows .*max_norm_ratio=0"):
        open_array(tmp_path / "a.npy", 0.1, 10.0)
    train, _ = open_array(tmp_path / "a.npy", 0.1, 0.0)
    assert train.n == 18


def test_a_bad_array_file_is_refused(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "a.npz").write_bytes(b"")
    messages = {"a.npy": "not a plain", "a.npz": "not a .npy", "b.npy": "file not found; give"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            open_array(tmp_path / name, 0.1)
    with pytest.raises(UserError, match="found .relative to /.* where it was trained.; give"):
        open_array("absent.npy", 0.1)


def test_counts_that_do_not_fit_the_shards_are_refused(tmp_path):
    make_store(tmp_path)
    counts = dataclasses.asdict(store.Counts(kept=11))
    change_manifest(tmp_path, counts=counts)
    with pytest.raises(UserError, match="make no sense"):
        store.open_store(tmp_path)


def test_a_store_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / ".mean.npy.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="mean.npy cannot be written: .*; make room"):
        store.write_array(tmp_path / "mean.npy", np.zeros(4, np.float32))
