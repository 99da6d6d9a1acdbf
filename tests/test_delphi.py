"""delphi's cache of latents, read back by a reader written from the format alone."""

import json

import numpy as np
import pytest
from saes import D, L, experts, plain, run
from safetensors.numpy import load_file

from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation import evaluator
from scale_sae_jax.evaluation.evaluator import EvalBatch
from scale_sae_jax.interop import delphi
from scale_sae_jax.sae.codes import Codes

S = 7


def read(folder, width):
    """(codes [rows, S, L] float16, tokens), as delphi's loader puts the files together."""
    edges = sorted(tuple(map(int, path.stem.split("_"))) for path in folder.glob("*.safetensors"))
    assert edges[0][0] == 0 and edges[-1][1] == width - 1
    assert all(end + 1 == start for (_, end), (start, _) in zip(edges, edges[1:]))
    whole = None
    for start, end in edges:
        split = load_file(folder / f"{start}_{end}.safetensors")
        tokens, locations = split["tokens"].astype(np.int64), split["locations"].astype(np.int64)
        assert split["locations"].dtype == np.uint16 and split["activations"].dtype == np.float16
        if whole is None:
            whole, first = np.zeros((*tokens.shape, width), np.float16), tokens
        np.testing.assert_array_equal(tokens, first)
        assert (locations[:, 2] <= end - start).all()
        assert (np.diff(locations @ [10**8, 10**4, 1]) > 0).all()  # sorted, none twice
        row, position, latent = locations.T
        whole[row, position, latent + start] = split["activations"]
    return whole, first


def batch(x, seed, rows=3):
    """Held-out rows with some positions that are not scored."""
    rng = np.random.default_rng(seed)
    x = x[rng.integers(0, len(x), (rows, S))]
    tokens = rng.integers(0, 50, (rows, S)).astype(np.int32)
    segments, scored = np.ones((rows, S), np.int32), rng.random((rows, S)) < 0.7
    documents = np.zeros((rows, S), np.int64)
    return EvalBatch(x, tokens, segments, documents, scored, np.ones((rows, S), bool))


@pytest.mark.parametrize("many, splits", [(True, 3), (False, 1), (False, L)])
def test_what_fires_is_read_back(many, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "CODES", 2 * S * L)  # of 3 rows, so one at a time if dense
    sae, params, x = experts() if many else plain("jumprelu")
    batches = [batch(x, 0), batch(x, 1)]
    norms = np.linalg.norm(np.concatenate([b.x for b in batches]), axis=-1)
    max_norm = np.quantile(norms, 0.9)
    settings = {"model_name": "gpt2", "dataset_repo": "docs.jsonl"}
    writer = delphi.save(
        sae, params, batches, tmp_path, "layers.8", settings, splits, float(max_norm)
    )
    found, tokens = read(tmp_path / "layers.8", L)
    np.testing.assert_array_equal(tokens, np.concatenate([b.tokens for b in batches]))
    flat = np.concatenate([b.x for b in batches]).reshape(-1, D)
    dense = np.asarray(run(sae, params, flat)[0])
    kept = np.concatenate([b.scored for b in batches]) & (norms <= max_norm)
    dense = np.where(kept.reshape(-1, 1), dense, 0).reshape(6, S, L)
    np.testing.assert_allclose(found, dense, rtol=1e-3, atol=1e-5)
    assert writer.rows == 6 and writer.fired == (found != 0).sum() > 0
    config = json.loads((tmp_path / "layers.8/config.json").read_text())
    assert config == settings | {"n_splits": splits, "n_tokens": 6 * S, "cache_ctx_len": S}
    assert len(list((tmp_path / "layers.8").iterdir())) == splits + 1


def test_delphi_own_loader_reads_the_same(tmp_path):
    loader = pytest.importorskip("delphi.latents.loader", exc_type=ImportError)
    sae, params, x = plain("jumprelu")
    delphi.save(sae, params, [batch(x, 0)], tmp_path, "layers.8", {}, 4)
    expected, tokens = read(tmp_path / "layers.8", L)
    found = np.zeros_like(expected)
    for path in (tmp_path / "layers.8").glob("*.safetensors"):
        locations, activations, theirs = loader.TensorBuffer(str(path), "layers.8").load()
        found[tuple(locations.numpy().T)] = activations.numpy()
        np.testing.assert_array_equal(theirs.numpy(), tokens)
    np.testing.assert_array_equal(found, expected)


def codes(values, ids):
    return Codes(np.float32(values).reshape(1, 1, -1), np.int32(ids).reshape(1, 1, -1))


def test_wide_splits_and_small_activations(tmp_path):
    """Beyond 65,536 latents a split, places are uint32; at most 1e-5 does not count."""
    with delphi.CacheWriter(tmp_path, "h.3", 2**17, 1) as writer:
        writer.add(np.array([[5]]), codes([1.5, 1e-5, -2.0], [2**17 - 1, 3, 70_000]))
    split = load_file(tmp_path / "h.3" / f"0_{2**17 - 1}.safetensors")
    assert split["locations"].dtype == np.uint32
    np.testing.assert_array_equal(split["locations"], [[0, 0, 70_000], [0, 0, 2**17 - 1]])
    np.testing.assert_array_equal(split["activations"], np.float16([-2.0, 1.5]))


def test_mistakes_leave_no_cache_behind(tmp_path):
    writer = delphi.CacheWriter(tmp_path, "layers.8", L)
    with pytest.raises(UserError, match="latent 7 has an activation of 7e[+]04"), writer:
        writer.add(np.zeros((1, 1), int), codes([70_000.0], [7]))
    with pytest.raises(UserError, match="cannot join"), writer:
        writer.add(np.zeros((1, 1), int), codes([1.0], [7]))
        writer.add(np.zeros((1, 2), int), codes([1.0], [7]))
    assert not list((tmp_path / "layers.8").iterdir())
    with pytest.raises(UserError, match="no row of tokens"), delphi.CacheWriter(tmp_path, "a", L):
        pass
    with pytest.raises(UserError, match="41 splits of 40 latents"):
        delphi.CacheWriter(tmp_path, "b", L, L + 1)
    with pytest.raises(UserError, match="plain relative name"):
        delphi.CacheWriter(tmp_path, "../b", L)
    sae, params, x = plain("topk")
    array = batch(x, 0)._replace(tokens=None)
    with pytest.raises(UserError, match="come from an array"):
        delphi.save(sae, params, [array], tmp_path, "c", {})
