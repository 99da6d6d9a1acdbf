"""Masks, and the harvest from text to store, on a stand-in for a language model."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from scale_sae_jax.activations import store
from scale_sae_jax.activations.forward import ReadableModel, params_on, run_model
from scale_sae_jax.activations.harvest import _start, content_settings, harvest
from scale_sae_jax.activations.masks import Fate, fates, keep, outliers, token_flags
from scale_sae_jax.config import ActivationsConfig, LMConfig, TextConfig
from scale_sae_jax.errors import UserError
from scale_sae_jax.parallel.mesh import make_mesh
from scale_sae_jax.text.packing import TokenRows, pack, row_batches
from scale_sae_jax.text.splits import document_hash, training_documents

D, SPECIAL, FAR = 8, 1, 5


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
    """Words w0 ... w39 as ids 0 ... 39; 0 is BOS, 0 and 1 are special."""

    backend: tokenizers.Tokenizer
    bos_id: int = 0
    special_ids: frozenset[int] = frozenset({0, SPECIAL})

    def encode_batch(self, texts):
        return [encoding.ids for encoding in self.backend.encode_batch(texts)]


def word_tokenizer():
    vocab = {f"w{i}": i for i in range(40)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return WordTokenizer(backend)


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """x = embedding of the token + layer; token FAR and position 0 are far out."""

    params: Any
    tokenizer: WordTokenizer
    name: str = "tiny"
    sha256: str = "0" * 64

    def run_to(self, params, tokens, segments, layer):
        start = jnp.diff(segments, axis=1, prepend=0) != 0
        far = jnp.where(start | (tokens == FAR), 1000.0, 0.0)
        return params[tokens] + layer + far[..., None]


def model():
    embedding = np.random.default_rng(0).normal(size=(40, D)).astype(np.float32)
    return TinyModel(jnp.asarray(embedding), word_tokenizer())


def write_text(path, documents=120, seed=0):
    rng = np.random.default_rng(seed)
    lines = [" ".join(f"w{i}" for i in rng.integers(1, 40, rng.integers(1, 40)))
             for _ in range(documents)]
    path.write_text("\n".join(lines))
    return str(path)


LM = LMConfig(layer=2, rows_per_batch=8)
ACTIVATIONS = ActivationsConfig(tokens=1000, shard_rows=300)


def text_config(tmp_path, **options):
    path = tmp_path / "text.txt"
    if not path.exists():
        write_text(path)
    return TextConfig(path=str(path), heldout_fraction=0.2, context=16, **options)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def reference(lm, text, config, part=slice(None)):
    """All positions in order by plain NumPy: activations, their fate, and the document."""
    documents = list(training_documents(text))[part]
    rows = list(pack(documents, lm.tokenizer, text.context, text.packing, text.bos))
    tokens, segments = np.stack([r.tokens for r in rows]), np.stack([r.segments for r in rows])
    start = np.diff(segments, axis=1, prepend=0) != 0
    x = np.asarray(lm.params)[tokens] + np.float32(LM.layer)
    x = x + np.where(start | (tokens == FAR), np.float32(1000), np.float32(0))[..., None]
    fate = np.where(segments == 0, "padding", np.where(start, "position_0", "kept"))
    fate[(fate == "kept") & (tokens <= SPECIAL)] = "special"
    norms = np.linalg.norm(x, axis=-1)
    median = np.median(norms[fate == "kept"])
    fate[(fate == "kept") & (norms > config.max_norm_ratio * median)] = "outliers"
    return x.reshape(-1, D), fate.reshape(-1), np.stack([r.documents for r in rows]).reshape(-1)


def begin_parts(parts, lm, text, config, folder):
    """The empty store that so many processes begin."""
    _start(lm, content_settings(lm, text, config, LM), folder, parts)


def as_set(rows):
    return sorted(map(tuple, rows.tolist()))


def test_a_store_with_other_settings_is_refused_with_what_to_do(tmp_path):
    lm, text = model(), text_config(tmp_path)
    begin_parts(2, lm, text, ACTIVATIONS, tmp_path / "store")
    other = dataclasses.replace(ACTIVATIONS, tokens=2000)
    told = "activations.tokens = 1000, not 2000: take --config.activations.tokens=1000, choose"
    with pytest.raises(UserError, match=told):
        begin_parts(2, lm, text, other, tmp_path / "store")


def test_stand_in_is_a_model():
    assert isinstance(model(), ReadableModel)


def test_flags_and_fates_by_hand():
    tokens = np.array([[0, 7, 1, 0, 7, 0], [3, 1, 7, 7, 0, 0]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 0]], np.int32)
    flags = token_flags(tokens, segments, {0, 1})
    assert flags.padding.astype(int).tolist() == [[0, 0, 0, 0, 0, 1]] * 2
    assert flags.position_0.astype(int).tolist() == [[1, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0]]
    assert flags.special.astype(int).tolist() == [[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0]]
    k, p, z, s = Fate.KEPT, Fate.PADDING, Fate.POSITION_0, Fate.SPECIAL
    every = ActivationsConfig()
    assert fates(flags, every).tolist() == [[z, k, s, z, k, p], [z, s, z, k, s, p]]
    assert (keep(flags, every) == (fates(flags, every) == k)).all()
    no_start = ActivationsConfig(drop_position_0=False)
    assert fates(flags, no_start).tolist() == [[s, k, s, s, k, p], [k, s, k, k, s, p]]
    nothing = ActivationsConfig(mask_padding=False, drop_position_0=False, drop_special=False)
    assert keep(flags, nothing).all()


def test_no_special_ids():
    tokens = np.zeros((1, 3), np.int32)
    assert not token_flags(tokens, tokens + 1, frozenset()).special.any()


def test_outliers():
    norms = np.array([1.0, 20.0, 20.1], np.float32)
    assert outliers(norms, 2.0, 10.0).tolist() == [False, False, True]
    assert not outliers(norms, 2.0, 0.0).any()


@pytest.mark.parametrize("packing", ["pack", "one"])
def test_store_holds_exactly_the_kept_activations(tmp_path, packing):
    lm, text = model(), text_config(tmp_path, packing=packing)
    config = dataclasses.replace(ACTIVATIONS, dtype="float32", tokens=10**6)
    harvest(lm, text, config, LM, tmp_path / "store")
    opened = store.open_store(tmp_path / "store")
    store.verify(opened)
    x, fate, _ = reference(lm, text, config)
    kept = x[fate == "kept"]
    rows = opened.rows(np.arange(opened.n))
    assert as_set(rows) == as_set(kept)
    assert not (rows == kept).all()
    assert opened.mean == pytest.approx(kept.mean(axis=0), abs=1e-5)
    squared = (kept.astype(np.float64) ** 2).sum(axis=1).mean()
    assert opened.manifest.mean_squared_norm == pytest.approx(squared, rel=1e-6)
    counts = dataclasses.asdict(opened.manifest.counts)
    for name in ("padding", "position_0", "special", "outliers", "kept"):
        assert counts[name] == (fate == name).sum() > 0, name
    assert counts["tokens_seen"] == len(fate) == counts["rows"] * text.context
    assert "the text ended after" in opened.manifest.note


def test_counts_add_up_and_end_at_the_last_kept_token(tmp_path):
    lm, text = model(), text_config(tmp_path)
    manifest = harvest(lm, text, ACTIVATIONS, LM, tmp_path / "store")
    _, fate, documents = reference(lm, text, ACTIVATIONS)
    counts = manifest.counts
    end = np.flatnonzero(fate == "kept")[ACTIVATIONS.tokens - 1] + 1
    assert (counts.kept, counts.tokens_seen, manifest.note) == (1000, end, "")
    parts = (counts.padding, counts.position_0, counts.special, counts.outliers, counts.kept)
    assert sum(parts) == counts.tokens_seen
    assert [shard.rows for shard in manifest.shards] == [300, 300, 300, 100]
    texts = [document.text for document in training_documents(text)]
    read = np.unique(documents[:end])
    hashes = {document_hash(texts[i]) for i in read[read >= 0]}
    opened = store.open_store(tmp_path / "store")
    assert opened.documents().tolist() == sorted(hashes)
    assert counts.documents == len(hashes)


def test_bfloat16_store_rounds_to_nearest(tmp_path):
    lm, text = model(), text_config(tmp_path)
    for dtype in ("bfloat16", "float32"):
        config = dataclasses.replace(ACTIVATIONS, dtype=dtype)
        harvest(lm, text, config, LM, tmp_path / dtype)
    ids = np.arange(1000)
    exact = store.open_store(tmp_path / "float32").rows(ids)
    rounded = store.open_store(tmp_path / "bfloat16").rows(ids)
    assert (rounded == np.asarray(jnp.asarray(exact).astype(jnp.bfloat16).astype("f4"))).all()
    assert (rounded != exact).any()


def test_options_keep_what_they_say(tmp_path):
    lm, text = model(), text_config(tmp_path)
    config = ActivationsConfig(
        tokens=10**6, mask_padding=False, drop_position_0=False, drop_special=False,
        max_norm_ratio=0.0,
    )
    counts = harvest(lm, text, config, LM, tmp_path / "store").counts
    assert counts.kept == counts.tokens_seen


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_killed_harvest_resumes_to_the_same_bytes(tmp_path, shards):
    lm, text = model(), text_config(tmp_path)
    harvest(lm, text, ACTIVATIONS, LM, tmp_path / "whole")

    def kill(done, total):
        assert total == ACTIVATIONS.tokens
        if done > shards * ACTIVATIONS.shard_rows:
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        harvest(lm, text, ACTIVATIONS, LM, cut, kill)
    assert len(list(cut.glob("shard-*"))) == shards
    if shards:
        with pytest.raises(UserError, match="did not finish"):
            store.open_store(cut)
    harvest(lm, text, ACTIVATIONS, LM, cut)
    assert files(cut) == files(tmp_path / "whole")


def test_killed_after_the_last_shard(tmp_path, monkeypatch):
    """All text is read and written, but neither the mean nor `complete`."""
    lm, text = model(), text_config(tmp_path)
    for tokens in (10**6, 600):
        config = dataclasses.replace(ACTIVATIONS, tokens=tokens)
        whole, cut = tmp_path / f"whole {tokens}", tmp_path / f"cut {tokens}"
        harvest(lm, text, config, LM, whole)
        write_array = store.write_array

        def kill(path, array, write_array=write_array):
            if path.name == store.MEAN:
                raise KeyboardInterrupt
            write_array(path, array)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(store, "write_array", kill)
            harvest(lm, text, config, LM, cut)
        harvest(lm, text, config, LM, cut)
        assert files(cut) == files(whole)


@pytest.mark.parametrize("tokens", [10**6, 500])
def test_a_store_of_parts(tmp_path, tokens):
    """Each part is the harvest of every third document; one process can go on with all three."""
    lm, text = model(), text_config(tmp_path)
    config = dataclasses.replace(ACTIVATIONS, dtype="float32", tokens=tokens, shard_rows=100)

    def begin(folder):
        begin_parts(3, lm, text, config, folder)
        return folder

    seen = []
    manifest = harvest(lm, text, config, LM, begin(tmp_path / "store"), lambda *a: seen.append(a))
    opened = store.open_store(tmp_path / "store")
    store.verify(opened)
    stripes = [reference(lm, text, config, slice(part, None, 3)) for part in range(3)]
    kept = [x[fate == "kept"] for x, fate, _ in stripes]
    kept = [x[: tokens // 3 + (part < tokens % 3)] for part, x in enumerate(kept)]
    rows = opened.rows(np.arange(opened.n))
    starts = np.cumsum([0, *map(len, kept)])
    for part, start, stop in zip(kept, starts, starts[1:], strict=False):
        assert as_set(rows[start:stop]) == as_set(part)
    assert seen[-1] == (opened.n, tokens) and opened.n == sum(map(len, kept))
    assert bool(manifest.note) == (tokens == 10**6)
    everything = np.concatenate(kept)
    assert opened.mean == pytest.approx(everything.mean(axis=0), abs=1e-5)
    squared = (everything.astype(np.float64) ** 2).sum(axis=1).mean()
    assert manifest.mean_squared_norm == pytest.approx(squared, rel=1e-6)
    if tokens == 10**6:
        texts = [document.text for document in training_documents(text)]
        read = {document_hash(texts[3 * i + part])
                for part, (*_, documents) in enumerate(stripes) for i in documents if i >= 0}
        assert opened.documents().tolist() == sorted(read)
    assert manifest.counts.documents == len(opened.documents())

    def kill(done, total):
        if done > 250:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(lm, text, config, LM, begin(tmp_path / "cut"), kill)
    with pytest.raises(UserError, match="did not finish"):
        store.open_store(tmp_path / "cut")
    assert harvest(lm, text, config, LM, tmp_path / "cut") == manifest
    assert files(tmp_path / "cut") == files(tmp_path / "store")


def test_resuming_over_a_damaged_shard_is_refused(tmp_path):
    lm, text = model(), text_config(tmp_path)

    def kill(done, total):
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(lm, text, ACTIVATIONS, LM, tmp_path / "cut", kill)
    path = tmp_path / "cut" / "shard-00000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")
    with pytest.raises(UserError, match="checksum differs"):
        harvest(lm, text, ACTIVATIONS, LM, tmp_path / "cut")


def test_complete_store_is_returned_without_work(tmp_path):
    lm, text = model(), text_config(tmp_path)
    first = harvest(lm, text, ACTIVATIONS, LM, tmp_path / "store")

    def forbidden(done, total):
        raise AssertionError

    again = harvest(lm, text, ACTIVATIONS, LM, tmp_path / "store", forbidden)
    assert json.dumps(dataclasses.asdict(again)) == json.dumps(dataclasses.asdict(first))


def test_other_settings_are_refused_by_name(tmp_path):
    lm, text = model(), text_config(tmp_path)
    harvest(lm, text, ACTIVATIONS, LM, tmp_path / "store")
    other = dataclasses.replace
    for changed, name in [
        ((lm, other(text, context=17), ACTIVATIONS, LM), "text.context = 16, not 17"),
        ((lm, text, other(ACTIVATIONS, tokens=999), LM), "activations.tokens = 1000, not 999"),
        ((lm, text, ACTIVATIONS, other(LM, layer=1)), "lm.layer = 2, not 1"),
        ((other(lm, sha256="1"), text, ACTIVATIONS, LM), "model_sha256 = 0"),
    ]:
        with pytest.raises(UserError, match=f"{name}.*--config.activations.path"):
            harvest(*changed, tmp_path / "store")
    write_text(tmp_path / "text.txt", seed=1)
    with pytest.raises(UserError, match="source.text.txt"):
        harvest(lm, text, ACTIVATIONS, LM, tmp_path / "store")


def test_text_elsewhere_is_the_same_text(tmp_path):
    lm, text = model(), text_config(tmp_path)
    harvest(lm, text, ACTIVATIONS, LM, tmp_path / "store")
    (tmp_path / "moved").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "moved" / "text.txt")
    moved = dataclasses.replace(text, path=str(tmp_path / "moved" / "text.txt"))
    assert harvest(lm, moved, ACTIVATIONS, LM, tmp_path / "store").complete


def test_too_little_text(tmp_path):
    lm = model()
    (tmp_path / "text.txt").write_text("w1 w1 w1\nw1 w1")
    text = TextConfig(path=str(tmp_path / "text.txt"), heldout_fraction=1e-9, context=8)
    with pytest.raises(UserError, match="no activation is left"):
        harvest(lm, text, ACTIVATIONS, LM, tmp_path / "none")
    (tmp_path / "text.txt").write_text("w7 w8 w9\nw6 w5 w7")
    manifest = harvest(lm, text, ACTIVATIONS, LM, tmp_path / "some")
    assert (manifest.n, manifest.counts.outliers) == (5, 1)
    assert manifest.note == "the text ended after 5 of 1000 activations"


def test_everything_an_outlier(tmp_path):
    config = dataclasses.replace(ACTIVATIONS, max_norm_ratio=1e-3)
    with pytest.raises(UserError, match="no activation is left"):
        harvest(model(), text_config(tmp_path), config, LM, tmp_path / "store")


def test_not_finite_is_refused(tmp_path):
    lm = dataclasses.replace(model(), params=jnp.full((40, D), jnp.nan))
    with pytest.raises(UserError, match="NaN or infinity"):
        harvest(lm, text_config(tmp_path), ACTIVATIONS, LM, tmp_path / "store")


@pytest.mark.parametrize(("rows_per_batch", "split_params"), [(8, False), (3, False), (8, True)])
def test_rows_are_split_over_all_devices(tmp_path, monkeypatch, rows_per_batch, split_params):
    """And the next batch is dispatched before the result of one is fetched."""
    lm, text = model(), text_config(tmp_path)
    rows = pack(training_documents(text), lm.tokenizer, 16, "pack", True)
    dispatched, devices, device_get = [], [], jax.device_get

    def fetch(result):
        devices.append(len(result[0].sharding.device_set))
        return device_get(result)

    monkeypatch.setattr(jax, "device_get", fetch)

    def watched():
        for batch in row_batches(rows, rows_per_batch):
            dispatched.append(batch)
            yield batch

    lm_config = dataclasses.replace(LM, rows_per_batch=rows_per_batch, split_params=split_params)
    here = params_on(make_mesh("", 1), lm, lm_config)
    assert here.sharding.shard_shape(here.shape) == ((5, D) if split_params else (40, D))
    slabs = run_model(lm, lm_config, watched(), ActivationsConfig(dtype="float32"))
    first = next(slabs)
    assert len(dispatched) == 2
    batch: TokenRows = dispatched[0]
    expected = np.asarray(lm.run_to(lm.params, batch.tokens, batch.segments, LM.layer))
    assert first.x == pytest.approx(expected.reshape(-1, D), rel=1e-6)
    positions = len(first.x) + sum(len(slab.x) for slab in slabs)
    assert set(devices) == {8}
    assert positions == sum((b.segments[:, 0] > 0).sum() for b in dispatched) * 16
