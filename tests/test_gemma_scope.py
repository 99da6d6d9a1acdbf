"""Gemma Scope's params.npz: read back by its own formulas."""

import errno
from pathlib import Path

import numpy as np
import pytest
from saes import L, assert_same, experts, plain, run

from scale_sae_jax.errors import UserError
from scale_sae_jax.interop import gemma_scope


@pytest.mark.parametrize("name", ("jumprelu", "batchtopk", "matryoshka", "relu", "gated"))
def test_params_npz_computes_the_same(name, tmp_path):
    sae, params, x = plain(name)
    gemma_scope.save(sae, params, tmp_path / "out")
    p = np.load(tmp_path / "out/params.npz", allow_pickle=False)
    assert set(p.files) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    assert all(p[name].dtype == np.float32 for name in p.files) and p["threshold"].shape == (L,)
    pre = x @ p["W_enc"] + p["b_enc"]
    codes = (pre > p["threshold"]) * np.maximum(pre, 0)
    ours, x_hat = run(sae, params, x)
    assert (codes != 0).any() and (codes == 0).any()
    assert_same(ours, codes)
    assert_same(x_hat, codes @ p["W_dec"] + p["b_dec"])


def test_what_is_no_jumprelu_is_refused(tmp_path):
    for (sae, params, _), reason in ((plain("topk"), "not a JumpReLU"), (experts(), "a router")):
        with pytest.raises(UserError, match=reason):
            gemma_scope.save(sae, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    sae, params, _ = plain("relu")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="params.npz cannot be written: No space left"):
        gemma_scope.save(sae, params, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())  # so that it can be tried again
