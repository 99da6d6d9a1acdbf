"""State dicts of torch.save: dictionary_learning, published checkpoints, and hostile files."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from saes import assert_same, run
from safetensors.numpy import save_file
from test_published import load as published_vectors

from scale_sae_jax.errors import UserError
from scale_sae_jax.interop import dictionary_learning, published
from scale_sae_jax.interop.files import read_tensors

torch = pytest.importorskip("torch")
D, L, K = 10, 30, 4


def dictionary(folder, name="AutoEncoderTopK", threshold=0.3, **tensors):
    """A folder as dictionary_learning writes it, and its weights."""
    rng = np.random.default_rng(0)
    shapes = {
        "encoder.weight": (L, D),
        "encoder.bias": (L,),
        "decoder.weight": (D, L),
        "b_dec": (D,),
    }
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    folder.mkdir()
    torch.save(state | tensors, folder / "ae.pt")
    trainer = {"dict_class": name, "k": K}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return arrays, rng.normal(size=(25, D)).astype(np.float32)


@pytest.mark.parametrize("name", ("AutoEncoderTopK", "BatchTopKSAE"))
@pytest.mark.parametrize("threshold", (0.7, -1.0))
def test_dictionary_learning(name, threshold, tmp_path):
    w, x = dictionary(tmp_path / "d", name, threshold)
    acts = np.maximum((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    if name == "BatchTopKSAE":
        expected = np.where(acts > threshold, acts, 0)
    else:
        expected = np.where(acts >= np.sort(acts)[:, -K, None], acts, 0)
    sae, params = dictionary_learning.load(tmp_path / "d")
    codes, x_hat = run(sae, params, x)
    assert sae.k == K
    assert_same(codes, expected)
    assert_same(x_hat, expected @ w["decoder.weight"].T + w["b_dec"])


@pytest.mark.parametrize(
    "name, tensors, reason",
    [
        ("GatedAutoEncoder", {}, "dict_class 'GatedAutoEncoder' is not read"),
        ("AutoEncoderTopK", {"k": torch.tensor(K + 1)}, "another k than the 4"),
        ("AutoEncoderTopK", {"b_dec": torch.full((D,), torch.nan)}, "'b_dec' holds NaN"),
        ("AutoEncoderTopK", {"extra": torch.zeros(2)}, "'extra' that its architecture"),
        ("AutoEncoderTopK", {"decoder.weight": torch.zeros(L, D)}, "'decoder.weight' has shape"),
    ],
)
def test_other_dictionaries_are_refused(name, tensors, reason, tmp_path):
    dictionary(tmp_path / "d", name, **tensors)
    with pytest.raises(UserError, match=reason):
        dictionary_learning.load(tmp_path / "d")


@pytest.mark.parametrize("ending", ("pt", "safetensors"))
def test_published_checkpoints_from_files(ending, tmp_path):
    v, state = published_vectors("scale_e2")
    path = tmp_path / f"scale.{ending}"
    if ending == "pt":
        torch.save({name: torch.tensor(array) for name, array in state.items()}, path)
    else:
        save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
    sae, params = published.from_file(path, k=int(v["k"]), active=2)
    assert_same(run(sae, params, v["x"])[1], v["x_hat"])


def test_half_precision_is_read(tmp_path):
    weights = torch.tensor([[1.5, -2.25]])
    torch.save({"a": weights.bfloat16(), "b": weights.half()}, tmp_path / "half.pt")
    tensors = read_tensors(tmp_path / "half.pt")
    np.testing.assert_array_equal(tensors["a"], [[1.5, -2.25]])
    np.testing.assert_array_equal(tensors["b"], [[1.5, -2.25]])


@pytest.mark.filterwarnings("ignore")  # of PyTorch, that some of these kinds may go
@pytest.mark.parametrize("kind", ("sparse", "quantised", "meta", "nested"))
def test_tensors_that_are_no_plain_arrays_are_refused(kind, tmp_path):
    make = {
        "sparse": lambda: torch.eye(4).to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
        "meta": lambda: torch.empty(4, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }
    torch.save({"w": make[kind]()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt tensor 'w' is sparse, nested, quantised") as refused:
        read_tensors(tmp_path / "a.pt")
    assert "\n" not in str(refused.value)


class Attack:
    """Unpickles to a call that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def hostile(path, mark):
    """Files that must be told in one line, each with a part of it."""
    torch.save({"a": Attack(mark)}, path / "code.pt")
    (path / "bare.pt").write_bytes(pickle.dumps(Attack(mark)))
    torch.save({"a": torch.zeros(1).expand(10**7, 10**5)}, path / "endless.pt")
    torch.save([torch.zeros(2)], path / "list.pt")
    torch.save({"a": {"b": torch.zeros(2)}}, path / "nested.pt")
    torch.save({"a": torch.ones(5000)}, path / "whole.pt")
    whole = (path / "whole.pt").read_bytes()
    (path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(
        path / "bomb.pt", "w", zipfile.ZIP_DEFLATED
    ) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    (path / "empty.pt").write_bytes(b"")
    (path / "weights.pkl").write_bytes(pickle.dumps({}))
    (path / "text.safetensors").write_text("no tensors")
    return {
        "code.pt": "a pickle that may run code",
        "bare.pt": "a bare pickle",
        "endless.pt": "larger than the file",
        "list.pt": "no state dict",
        "nested.pt": "no state dict",
        "cut.pt": "truncated",
        "bomb.pt": "more than its own",
        "empty.pt": "truncated",
        "weights.pkl": "of no known kind",
        "text.safetensors": "no safetensors file",
        "absent.pt": "there is no file",
    }


def test_hostile_files_are_refused_and_run_nothing(tmp_path):
    mark = tmp_path / "mark"
    for name, reason in hostile(tmp_path, mark).items():
        with pytest.raises(UserError, match=reason) as refused:
            published.from_file(tmp_path / name, k=1, active=1)
        assert "\n" not in str(refused.value) and not mark.exists(), name
