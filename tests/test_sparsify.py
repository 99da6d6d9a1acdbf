"""sparsify folders: ours to theirs, theirs to ours, a decoder alone, and what is refused."""

import json

import jax
import numpy as np
import pytest
from saes import MIXTURES, D, K, L, assert_same, assert_same_function, experts, plain, run
from safetensors.numpy import load_file, save_file

from scale_sae_jax.errors import UserError
from scale_sae_jax.interop import sparsify


def by_hand(folder, x):
    """(codes, reconstruction) of a folder, as sparsify documents them, in NumPy."""
    t = load_file(folder / "sae.safetensors")
    acts = np.maximum((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 0)
    order = np.argsort(-acts, axis=-1)[:, json.loads((folder / "cfg.json").read_text())["k"] :]
    np.put_along_axis(acts, order, 0, axis=-1)
    return acts, acts @ t["W_dec"] + t["b_dec"]


def test_topk_back_and_forth(tmp_path):
    sae, params, x = plain("topk")
    sparsify.save(sae, params, tmp_path, "layers.8")
    folder = tmp_path / "layers.8"
    assert_same_function((sae, params), sparsify.load(folder), x)
    for ours, theirs in zip(run(sae, params, x), by_hand(folder, x), strict=True):
        assert_same(ours, theirs)


def test_an_expert_of_weight_one_alone(tmp_path):
    sae, params, x = experts(active=1, gate="renorm")
    sparsify.save(sae, params, tmp_path, "layers.8", expert=3)
    mine = np.asarray(jax.jit(sae.route)(params, x).experts)[:, 0] == 3
    assert mine.any()
    assert_same(by_hand(tmp_path / "layers.8", x[mine])[1], run(sae, params, x)[1][mine])


@pytest.mark.filterwarnings("ignore")
def test_sparsify_computes_the_same(tmp_path):
    theirs, torch = pytest.importorskip("sparsify"), pytest.importorskip("torch")
    sae, params, x = plain("topk")
    sparsify.save(sae, params, tmp_path, "layers.8")
    coder = theirs.SparseCoder.load_many(str(tmp_path), local=True)["layers.8"]
    with torch.no_grad():
        values, ids, _ = coder.encode(torch.tensor(x))
        codes = torch.zeros(len(x), L).scatter(1, ids, values)
        expected = codes, coder.decode(values, ids)
    for ours, other in zip(run(sae, params, x), expected, strict=True):
        assert_same(ours, other.numpy())


@pytest.mark.filterwarnings("ignore")
def test_sparsify_own_folder_becomes_ours(tmp_path):
    theirs, torch = pytest.importorskip("sparsify"), pytest.importorskip("torch")
    torch.manual_seed(0)
    coder = theirs.SparseCoder(D, theirs.SparseCoderConfig(num_latents=L, k=K))
    coder.encoder.bias.data.normal_()
    coder.b_dec.data.normal_()
    coder.save_to_disk(tmp_path / "layers.8")
    sae, params = sparsify.load(tmp_path / "layers.8")
    x = np.random.default_rng(0).normal(size=(30, D)).astype(np.float32)
    with torch.no_grad():
        expected = coder(torch.tensor(x)).sae_out.numpy()
    assert_same(run(sae, params, x)[1], expected)


@pytest.mark.filterwarnings("ignore")
def test_a_decoder_alone_is_exact(tmp_path):
    sae, params, x = experts(**MIXTURES[0])
    sparsify.save_decoder(sae, params, tmp_path, "layers.8")
    folder = tmp_path / "layers.8"
    t, codes = load_file(folder / "sae.safetensors"), jax.jit(sae.encode)(params, x)
    rows = np.asarray(codes.values)[..., None] * t["W_dec"][np.asarray(codes.ids)]
    assert_same(rows.sum(1) + t["b_dec"], run(sae, params, x)[1])
    assert np.isnan(by_hand(folder, x)[1]).all()
    with pytest.raises(UserError, match="holds a decoder alone, without what"):
        sparsify.load(folder)
    theirs, torch = pytest.importorskip("sparsify"), pytest.importorskip("torch")
    coder = theirs.SparseCoder.load_from_disk(folder)
    values, ids = (torch.tensor(np.array(part)) for part in codes)
    assert_same(coder.decode(values, ids.long()).detach().numpy(), run(sae, params, x)[1])


@pytest.mark.parametrize(
    "name, reason",
    [("jumprelu", "by another rule"), ("gated", "by another rule"), ("many", "a router masks")],
)
def test_what_is_no_topk_is_refused(name, reason, tmp_path):
    sae, params, _ = experts() if name == "many" else plain(name)
    with pytest.raises(UserError, match=reason):
        sparsify.save(sae, params, tmp_path / "out", "layers.8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ("../out", "/layers.8", "a/../b", "", "layers.*"))
def test_hookpoints_stay_inside_the_folder(name, tmp_path):
    sae, params, _ = plain("topk")
    with pytest.raises(UserError, match="must be a plain relative name"):
        sparsify.save(sae, params, tmp_path / "root", name)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(activation="groupmax"), "ours has only topk"),
        (dict(skip_connection=True), "adds a linear map"),
        (dict(transcode=True), "predicts other activations"),
        (dict(num_latents=L + 1), "num_latents does not say 40"),
        (dict(k=L + 1), "k = 41 exceeds"),
        (dict(d_in=D + 1), r"'encoder.weight' has shape \(40, 12\)"),
        (dict(k="5"), "k = '5' must be of type int"),
    ],
)
def test_settings_that_ours_lacks_are_refused(changes, reason, tmp_path):
    sae, params, _ = plain("topk")
    sparsify.save(sae, params, tmp_path, "layers.8")
    path = tmp_path / "layers.8/cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=reason):
        sparsify.load(tmp_path / "layers.8")


def test_damaged_weights_are_refused(tmp_path):
    sae, params, _ = plain("topk")
    sparsify.save(sae, params, tmp_path, "layers.8")
    path = tmp_path / "layers.8/sae.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"W_skip": np.zeros((D, D), np.float32)}, path)
    with pytest.raises(UserError, match="'W_skip' that its architecture does not have"):
        sparsify.load(path.parent)
    save_file(tensors | {"b_dec": np.full(D, np.inf, np.float32)}, path)
    with pytest.raises(UserError, match="'b_dec' holds NaN or infinity"):
        sparsify.load(path.parent)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated"):
        sparsify.load(path.parent)
