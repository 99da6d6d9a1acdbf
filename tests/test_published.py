"""The `authors` preset against vectors computed by the published PyTorch modules."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scale_sae_jax.errors import UserError
from scale_sae_jax.interop.published import from_state_dict

GOLDEN = Path(__file__).parent / "golden"
FILES = ["scale_e2", "scale_e4", "switch_e1"]


def load(name):
    """The vectors, and the same parameters under the published names."""
    v = dict(np.load(GOLDEN / f"{name}.npz"))
    state = {"gate.weight": v["w_gate"], "gate.bias": v["bias_gate"], "b_gate": v["b_gate"]}
    state["b_dec"] = v["b_dec"]
    for i in range(int(v["experts"])):
        state[f"expert_modules.{i}.encoder.weight"] = v["w_enc"][i]
        state[f"expert_modules.{i}.encoder.bias"] = v["b_enc"][i]
        state[f"expert_modules.{i}.decoder"] = v["w_dec"][i]
    if "omega" in v:
        state |= {"omega": v["omega"], "lp_transform_encoder.weight": v["low_pass"]}
    return v, state


def close(ours, theirs):
    """1e-5 relative to the largest entry of the tensor."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def imported(name):
    v, state = load(name)
    sae, params = from_state_dict(state, k=int(v["k"]), active=int(v["e"]))
    return v, sae, params


@pytest.mark.parametrize("name", FILES)
def test_values(name):
    v, sae, params = imported(name)
    codes = sae.encode(params, v["x"])
    order = np.argsort(-np.asarray(codes.values), axis=-1, kind="stable")
    close(np.take_along_axis(np.asarray(codes.values), order, -1), v["top_values"])
    dense = np.zeros((len(v["x"]), sae.latents), np.float32)
    np.put_along_axis(dense, np.asarray(codes.ids), np.asarray(codes.values), axis=-1)
    published = np.zeros_like(dense)
    np.put_along_axis(published, v["top_indices"], v["top_values"], axis=-1)
    close(dense, published)
    close(sae.route(params, v["x"]).probs, v["router_probs"])
    close(sae.decode(params, codes), v["x_hat"])
    close(sae.reconstruct(params, v["x"]), v["x_hat"])


@pytest.mark.parametrize("name", FILES)
def test_features_before_top_k(name):
    v, sae, params = imported(name)
    everything = dataclasses.replace(sae.config, k=sae.active * sae.latents // sae.experts)
    sae = dataclasses.replace(sae, module=sae.module.clone(config=everything), config=everything)
    codes = sae.encode(params, v["x"])
    dense = np.zeros_like(v["features"])
    np.put_along_axis(dense, np.asarray(codes.ids), np.asarray(codes.values), axis=-1)
    close(dense, v["features"])


@pytest.mark.parametrize("name", FILES)
def test_loss_and_gradients(name):
    v, sae, params = imported(name)
    dead = jnp.zeros(sae.latents, bool)
    loss, grads = jax.value_and_grad(lambda p: sae.loss(p, v["x"], dead).total)(params)
    close(loss, v["loss"])
    close(grads["w_enc"].swapaxes(1, 2), v["grad_w_enc"])
    close(grads["b_enc"], v["grad_b_enc"])
    close(grads["w_dec"], v["grad_w_dec"])
    close(grads["b_dec"], v["grad_b_dec"])
    close(grads["w_router"].T, v["grad_w_gate"])
    close(grads["b_router"], v["grad_b_gate"])
    if "omega" in v:
        close(grads["omega"], v["grad_omega"])
        close(grads["low_pass"].T, v["grad_low_pass"])


def test_heaviside_gives_every_selected_expert_weight_one():
    v, state = load("scale_e2")
    sae, params = from_state_dict(state, k=6, active=2, heaviside=True)
    x = v["x"]
    experts = np.asarray(sae.route(params, x).experts)
    mean = v["w_enc"].mean(1, keepdims=True) @ v["low_pass"].T
    scaled = mean + (1 + v["omega"])[:, None, None] * (v["w_enc"] - mean)
    acts = np.maximum(np.einsum("td,nmd->tnm", x - v["b_dec"], scaled) + v["b_enc"], 0)
    best = np.sort(np.stack([acts[t, experts[t]].ravel() for t in range(len(x))]))[:, ::-1][:, :6]
    close(np.sort(np.asarray(sae.encode(params, x).values))[:, ::-1], best)


def test_what_is_not_known_is_not_left_out():
    _, state = load("scale_e2")
    unused = {"beta": np.ones(4), "lp_transform_decoder.weight": np.ones((3, 3))}
    from_state_dict(state | unused, k=4, active=2)
    for name in ("expert_modules.99.decoder", "lp_transform_encoder.bias"):
        with pytest.raises(UserError, match=f"has a tensor '{name}' that"):
            from_state_dict(state | {name: np.ones(3)}, k=4, active=2)


def test_torch_tensors_in_bfloat16():
    torch = pytest.importorskip("torch")
    _, state = load("scale_e2")
    rounded = {name: torch.tensor(array).bfloat16() for name, array in state.items()}
    _, params = from_state_dict(rounded, k=4, active=2)
    np.testing.assert_array_equal(params["b_dec"], rounded["b_dec"].float().numpy())


def test_original_switch_layout():
    rng = np.random.default_rng(0)
    n, m, d, k = 4, 6, 10, 3
    state = {
        "encoder.weight": rng.normal(size=(n * m, d)),
        "router.weight": rng.normal(size=(n, d)),
        "decoder": rng.normal(size=(n * m, d)),
        "b_dec": rng.normal(size=d),
        "b_router": rng.normal(size=d),
    }
    x = rng.normal(size=(20, d)).astype(np.float32)
    sae, params = from_state_dict(state, k=k, active=1)
    logits = (x - state["b_router"]) @ state["router.weight"].T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.empty_like(x)
    for t in range(len(x)):
        i = p[t].argmax()
        rows = slice(i * m, (i + 1) * m)
        z = np.maximum(state["encoder.weight"][rows] @ (x[t] - state["b_dec"]), 0)
        z[np.argsort(-z)[k:]] = 0
        expected[t] = p[t, i] * z @ state["decoder"][rows] + state["b_dec"]
    close(sae.reconstruct(params, x), expected)


def test_missing_and_misshaped_tensors_are_named():
    _, state = load("scale_e2")
    with pytest.raises(UserError, match="expert_modules.3.decoder"):
        from_state_dict({n: a for n, a in state.items() if "3.decoder" not in n}, k=6, active=2)
    with pytest.raises(UserError, match="'omega' has shape"):
        from_state_dict(state | {"omega": np.zeros(5)}, k=6, active=2)
    with pytest.raises(UserError, match="exceeds"):
        from_state_dict(state, k=25, active=2)


@pytest.mark.parametrize("sizes", [dict(k=0, active=2), dict(k=-1, active=2), dict(k=6, active=0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(UserError, match="must be at least 1"):
        from_state_dict(load("scale_e2")[1], **sizes)
