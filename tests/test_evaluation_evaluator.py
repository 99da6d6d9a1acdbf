"""The whole evaluator on stand-ins: a tied autoencoder with experts and a one-matrix model."""

import gc
import json
import weakref
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scale_sae_jax.errors import UserError
from scale_sae_jax.evaluation import EvalBatch, evaluate
from scale_sae_jax.evaluation.evaluator import with_ablations

D, V, S = 4, 11, 6
TRAINING = {"tokens_seen": 5, "train_seconds": 2.0, "tokens_per_second": 2.5,
            "seconds_per_step": 2.0, "trained_together": 1}


class Codes(NamedTuple):
    values: jax.Array
    ids: jax.Array


class Routing(NamedTuple):
    probs: jax.Array
    experts: jax.Array


@dataclass(frozen=True)
class TiedSAE:
    """x̂ = b + the k largest ReLU((x − b) D_iᵀ) of the selected experts, times D_i."""

    latents: int
    k: int
    experts: int = 1
    active: int = 1
    width: int = D
    sparse_codes: bool = True

    def route(self, params, x):
        probs = jax.nn.softmax(x @ params["router"])
        return Routing(probs, jax.lax.top_k(probs, self.active)[1])

    def encode(self, params, x):
        selected = self.route(params, x).experts  # [T, e]
        expert = jnp.arange(self.latents) // (self.latents // self.experts)  # [M]
        open_ = (selected[:, :, None] == expert).any(1)  # [T, M]
        pre = (x - params["bias"]) @ params["decoder"].T
        return Codes(*jax.lax.top_k(jnp.where(open_, jax.nn.relu(pre), 0), self.k))

    def decode(self, params, codes):
        rows = params["decoder"][codes.ids]
        return params["bias"] + jnp.einsum("tk,tkd->td", codes.values, rows)

    def decoder(self, params):
        return params["decoder"]

    def n_params(self, params):
        return sum(p.size for p in params.values())


@dataclass(frozen=True)
class BigramLM:
    params: dict = field(compare=False)
    vocab: int = V

    def without_params(self):
        return replace(self, params=None)

    def run_from(self, params, hidden, segments, layer):
        return hidden @ params["unembed"] * (1 + layer)


SIGNED_AXES = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)


def parameters(decoder=SIGNED_AXES, experts=1, bias=0.0, seed=3):
    router = np.random.default_rng(seed).normal(size=(D, experts)).astype(np.float32)
    bias = np.broadcast_to(np.float32(bias), (D,))
    return jax.tree.map(jnp.asarray, {"decoder": decoder, "router": router, "bias": bias})


def model():
    unembed = np.random.default_rng(4).normal(size=(D, V)).astype(np.float32)
    return BigramLM({"unembed": jnp.asarray(unembed)})


def make_batch(rows=6, seed=0):
    """Rows of one or two segments with padding; position 0 of a segment is not scored."""
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, S), np.int32)
    segments[1::2, 3:] = 2
    segments[::3, 5:] = 0
    real = segments > 0
    starts = np.diff(segments, axis=1, prepend=0) != 0
    documents = np.where(real, 2 * np.arange(rows)[:, None] + (segments == 2), -1)
    return EvalBatch(
        x=rng.normal(1.0, 1.0, (rows, S, D)).astype(np.float32),
        tokens=rng.integers(0, V, (rows, S)).astype(np.int32),
        segments=segments,
        documents=documents.astype(np.int64),
        scored=real & ~starts,
        real=real,
    )


def scored_mean(batch):
    return batch.x[batch.scored].mean(0)


def run(sae, params, batches, **options):
    defaults = {
        "mean": np.zeros(D, np.float32),
        "median_norm": 2.0,
        "max_norm_ratio": 10.0,
        "lm": model(),
        "layer": 0,
        "training": TRAINING,
        "bootstrap": 50,
    }
    return evaluate(sae, params, batches, **(defaults | options))


def test_perfect_reconstruction():
    got = run(TiedSAE(latents=2 * D, k=D), parameters(), [make_batch()])
    assert got["fvu"] == pytest.approx(0, abs=1e-12)
    assert (got["cosine"], got["norm_ratio"]) == pytest.approx((1, 1))
    assert got["delta_ce"] == pytest.approx(0, abs=1e-6)
    assert got["recovered"] == pytest.approx(1)
    assert (got["l0"], got["l0_p5"], got["l0_p95"]) == (D, D, D)
    assert got["l0_ci95"] == pytest.approx([D, D])


def test_predicting_the_mean():
    """A decoder of zeros leaves the bias: fvu 1, no latent fires, as bad as the mean ablation."""
    batch = make_batch()
    params = parameters(np.zeros((8, D), np.float32), bias=scored_mean(batch))
    got = run(TiedSAE(latents=8, k=2), params, [batch], mean=scored_mean(batch))
    assert got["fvu"] == pytest.approx(1)
    assert got["recovered_mean"] == pytest.approx(0, abs=1e-5)
    assert (got["l0"], got["dead"], sum(got["density"])) == (0, 1, 0)
    assert got["redundancy_0.7"] is None


def test_against_numpy():
    batch, sae, params = make_batch(), TiedSAE(8, 3, experts=4, active=2), parameters(experts=4)
    got = run(sae, params, [batch], mean=scored_mean(batch))
    x = batch.x[batch.scored]
    codes = sae.encode(params, jnp.asarray(x))
    hat, probs = np.asarray(sae.decode(params, codes)), np.asarray(sae.route(params, x).probs)
    values, ids = np.asarray(codes.values), np.asarray(codes.ids)
    fired = np.unique(ids[values != 0])
    load = np.bincount(np.argsort(-probs)[:, :2].ravel(), minlength=4) / (2 * len(x))
    error = np.square(x - hat).sum(-1)
    expected = {
        "mse": error.mean(),
        "fvu": error.sum() / np.square(x - x.mean(0)).sum(),
        "l0": (values != 0).sum(-1).mean(),
        "dead": 1 - len(fired) / 8,
        "router_entropy": -(probs * np.log(probs)).sum(-1).mean(),
        "expert_load": list(load),
        "eval_tokens": len(x),
        "active_width": 4,
        "total_width": 8,
        "flops_per_token": 2 * D * 4 + 2 * D * 4 + 2 * D * 3,
        "params": 8 * D + D * 4 + D,
        **TRAINING,
    }
    assert {key: got[key] for key in expected} == {
        key: pytest.approx(value, rel=1e-5) for key, value in expected.items()
    }
    assert got["mse_ci95"][0] < got["mse"] < got["mse_ci95"][1]


def test_split_into_batches_changes_nothing():
    batch, sae, params = make_batch(), TiedSAE(8, 3, experts=4, active=2), parameters(experts=4)
    thirds = [jax.tree.map(lambda a: a[i : i + 2], batch) for i in (0, 2, 4)]
    mean = scored_mean(batch)
    whole, split = (run(sae, params, b, mean=mean) for b in ([batch], thirds))
    assert split.keys() == whole.keys()
    for key, value in whole.items():
        assert split[key] == (value if value is None else pytest.approx(value, rel=1e-5, abs=1e-6))


def test_padding_contributes_nothing():
    batch, sae, params = make_batch(), TiedSAE(8, 3), parameters()
    noisy = batch._replace(
        x=np.where(batch.real[..., None], batch.x, 1e4).astype(np.float32),
        tokens=np.where(batch.real, batch.tokens, 0),
    )
    empty = jax.tree.map(np.zeros_like, batch)._replace(
        documents=np.full_like(batch.documents, -1)
    )
    assert run(sae, params, [noisy, empty]) == run(sae, params, [batch])


def test_ablations_can_be_run_beforehand():
    batch, sae, params, lm = make_batch(), TiedSAE(8, 2), parameters(), model()
    mean = scored_mean(batch)
    plain = run(sae, params, [batch], mean=mean, lm=lm)
    before = with_ablations(batch, lm, 0, mean, 20.0)
    assert run(sae, params, [before], mean=mean, lm=lm) == plain
    other = before._replace(ablated=jax.tree.map(lambda term: 2 * term, before.ablated))
    doubled = run(sae, params, [other], mean=mean, lm=lm)
    assert doubled["ce_zero"] == pytest.approx(2 * plain["ce_zero"])
    assert doubled["ce_mean"] == pytest.approx(2 * plain["ce_mean"])
    assert doubled["ce_spliced"] == plain["ce_spliced"]


def test_what_is_compiled_keeps_no_parameters_of_the_language_model():
    lm = model()
    kept = weakref.ref(lm.params["unembed"])
    run(TiedSAE(8, 2), parameters(), [make_batch()], lm=lm)
    del lm
    gc.collect()
    assert kept() is None


def test_outliers_are_left_out_and_counted():
    batch, sae, params = make_batch(), TiedSAE(8, 2), parameters()
    plain = run(sae, params, [batch])
    row, position = np.argwhere(batch.scored)[0]
    x = batch.x.copy()
    x[row, position] *= 1000
    spiked = run(sae, params, [batch._replace(x=x)])
    everything = run(sae, params, [batch._replace(x=x)], max_norm_ratio=0.0)
    assert (plain["eval_outliers"], spiked["eval_outliers"]) == (0, 1)
    assert spiked["eval_tokens"] == plain["eval_tokens"] - 1
    assert spiked["fvu"] == pytest.approx(plain["fvu"], rel=0.2)
    assert spiked["mse_all"] > 100 * plain["mse_all"]
    assert everything["eval_outliers"] == 0
    assert everything["mse"] > 100 * plain["mse"]


def test_excluded_tokens_are_counted_by_reason():
    batch = make_batch()
    scored = batch.scored.copy()
    scored[0, 2] = False  # a special token inside the text
    got = run(TiedSAE(8, 2), parameters(), [batch._replace(scored=scored)])
    assert got["eval_special"] == 1
    assert got["eval_position_0"] == 6 + 3  # six rows, three of them with a second segment
    assert got["eval_documents"] == 9
    parts = ("eval_tokens", "eval_outliers", "eval_position_0", "eval_special")
    assert sum(got[key] for key in parts) == got["eval_tokens_all"] == batch.real.sum()


def test_an_array_of_activations_has_no_language_model():
    x = np.random.default_rng(0).normal(size=(40, 1, D)).astype(np.float32)
    everything = np.ones((40, 1), bool)
    blocks = np.arange(40, dtype=np.int64)[:, None] // 10
    batch = EvalBatch(x, None, np.ones((40, 1), np.int32), blocks, everything, everything)
    got = run(TiedSAE(8, 2, experts=2), parameters(experts=2), [batch], lm=None, layer=None)
    undefined = {key for key, value in got.items() if value is None}
    spliced = {"ce_clean", "ce_spliced", "ce_mean", "ce_zero", "ce_spliced_all", "delta_ce",
               "delta_ce_all", "recovered", "recovered_mean", "kl", "delta_ce_ci95"}
    assert undefined == spliced | {"expert_mi", "expert_mi_null"}
    assert got["fvu_ci95"][0] < got["fvu"] < got["fvu_ci95"][1]
    assert got["eval_position_0"] == 0


def test_result_is_flat_json_without_nan():
    got = run(TiedSAE(8, 2), parameters(), [make_batch()], training={})
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["tokens_seen"] is None
    assert got["redundancy_0.7_inter"] is None
    required = "mse fvu fvu_all mse_all cosine norm_ratio relative_bias l0 l0_p5 l0_p95 " \
        "ce_clean ce_spliced ce_mean ce_zero delta_ce recovered recovered_mean kl dead density " \
        "max_cosine_mean_null redundancy_0.9_intra_null redundancy_0.8_inter_null expert_load " \
        "load_cv router_entropy expert_mi expert_mi_null flops_per_token active_width " \
        "total_width params train_seconds tokens_per_second seconds_per_step mse_ci95 fvu_ci95 " \
        "delta_ce_ci95 l0_ci95 density_edges delta_ce_all ce_spliced_all"
    assert set(required.split()) <= got.keys()


def test_progress_sees_every_real_token_and_batches_compile_once():
    traces, steps = [], []

    class Counting(TiedSAE):
        def decode(self, params, codes):
            traces.append(1)
            return super().decode(params, codes)

    batches = [make_batch(seed=i) for i in range(3)]
    run(Counting(8, 2), parameters(), batches, progress=steps.append)
    assert steps == [b.real.sum() for b in batches]
    assert len(traces) == 1


@pytest.mark.parametrize("batches", [[], [make_batch()]])
def test_nothing_to_score_is_the_users_mistake(batches):
    with pytest.raises(UserError, match="held-out"):
        unscored = [b._replace(scored=np.zeros_like(b.scored)) for b in batches]
        run(TiedSAE(8, 2), parameters(), unscored)
