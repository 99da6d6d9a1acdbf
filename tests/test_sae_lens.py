"""SAELens directories: ours to SAELens and back, SAELens' own to ours, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saes import MIXTURES, PLAIN, D, K, L, assert_same, assert_same_function, experts, plain, run
from safetensors.numpy import load_file, save_file

from scale_sae_jax.errors import UserError
from scale_sae_jax.interop import sae_lens

METADATA = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_post"}
CASES = [*((name, {}) for name in PLAIN), *(("experts", options) for options in MIXTURES)]


def made(name, options):
    return experts(**options) if name == "experts" else plain(name, **options)


def theirs():
    """SAELens and torch, if they are installed (extra `sae_lens`), with `scale_moe`."""
    library = pytest.importorskip("sae_lens")
    import scale_sae_jax.interop.sae_lens_plugin  # noqa: F401

    return library, pytest.importorskip("torch")


@pytest.mark.parametrize("name", PLAIN)
def test_back_and_forth(name, tmp_path):
    sae, params, x = plain(name)
    sae_lens.save(sae, params, tmp_path / "out", METADATA)
    for ours, other in zip(run(sae, params, x), plain_by_hand(*read(tmp_path / "out"), x)):
        assert_same(ours, other)
    assert_same_function((sae, params), sae_lens.load(tmp_path / "out"), x)


@pytest.mark.parametrize("options", MIXTURES)
def test_many_experts_back_and_forth(options, tmp_path):
    sae, params, x = experts(**options)
    sae_lens.save(sae, params, tmp_path / "out", METADATA)
    cfg, tensors = read(tmp_path / "out")
    for ours, other in zip(run(sae, params, x), experts_by_hand(cfg, tensors, x)):
        assert_same(ours, other)
    cfg_again, again = sae_lens.describe(*sae_lens.load(tmp_path / "out"), METADATA)
    assert cfg_again == cfg and again.keys() == tensors.keys()
    for name, array in tensors.items():
        assert_same(again[name], array, 1e-6)


def test_what_was_loaded_runs(tmp_path):
    sae, params, x = experts(**MIXTURES[2], balance_rate=1e-3)
    sae_lens.save(sae, params, tmp_path / "out")
    assert_same_function((sae, params), sae_lens.load(tmp_path / "out"), x)


def read(folder):
    cfg = json.loads((folder / "cfg.json").read_text())
    return cfg, load_file(folder / "sae_weights.safetensors")


def plain_by_hand(cfg, t, x):
    """(codes, reconstructions) by the formulas that SAELens documents, in NumPy."""
    products = (x - t["b_dec"]) @ t["W_enc"]
    if cfg["architecture"] == "gated":
        magnitude = np.exp(t["r_mag"]) * products + t["b_mag"]
        codes = (products + t["b_gate"] > 0) * np.maximum(magnitude, 0)
    else:
        pre = products + t["b_enc"]
        codes = np.maximum(pre, 0)
        if cfg["architecture"] == "topk":
            codes *= pre >= np.sort(pre)[:, -cfg["k"], None]
        if cfg["architecture"] == "jumprelu":
            codes *= pre > t["threshold"]
    return codes, codes @ t["W_dec"] + t["b_dec"]


def experts_by_hand(cfg, t, x):
    """(codes, reconstructions) of `scale_moe` as docs/formats.md has it, in NumPy, by token."""
    n, e, k = cfg["n_experts"], cfg["active"], cfg["k"]
    m, codes = cfg["d_sae"] // n, np.zeros((len(x), cfg["d_sae"]))
    for z, token in zip(codes, x.astype(np.float64), strict=True):
        logits = (token - t["b_router_in"]) @ t["W_router"] + t["b_router_out"]
        p = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-(logits + t.get("balance", 0)))[:e]
        of_chosen = {
            "prob": p[chosen],
            "renorm": p[chosen] / p[chosen].sum(),
            "softmax_probs": np.exp(p[chosen]) / np.exp(p[chosen]).sum(),
            "softmax_logits": np.exp(logits[chosen]) / np.exp(logits[chosen]).sum(),
            "one": np.ones(e),
        }[cfg["gate"]]
        weight = np.zeros(n)
        weight[chosen] = of_chosen
        acts = np.maximum((token - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 0)
        acts[~np.isin(np.arange(n), chosen).repeat(m)] = 0
        if cfg["gate_at"] == "code":
            acts = acts * weight.repeat(m)
        if cfg["topk_scope"] == "batch":
            kept = acts > t["threshold"]
        elif cfg["topk_scope"] == "token":
            kept = acts >= np.sort(acts)[-k]
        else:
            kept = (acts.reshape(n, m) >= np.sort(acts.reshape(n, m))[:, -(k // e), None]).ravel()
        z[:] = np.where(kept, acts, 0)
        if cfg["gate_at"] == "output":
            z *= weight.repeat(m)
    return codes, codes @ t["W_dec"] + t["b_dec"]


@pytest.mark.parametrize("name, options", CASES)
@pytest.mark.filterwarnings("ignore")
def test_sae_lens_computes_the_same(name, options, tmp_path):
    library, torch = theirs()
    sae, params, x = made(name, options)
    sae_lens.save(sae, params, tmp_path / "out", METADATA)
    other = library.SAE.load_from_disk(tmp_path / "out")
    assert other.cfg.metadata.hook_name == "blocks.8.hook_resid_post"
    with torch.no_grad():
        codes = other.encode(torch.tensor(x).view(2, -1, D)).view(-1, L)
        x_hat = other(torch.tensor(x))
    for ours, other in zip(run(sae, params, x), (codes, x_hat), strict=True):
        assert_same(ours, other.numpy())


@pytest.mark.parametrize("name", ("standard", "topk", "jumprelu", "gated"))
@pytest.mark.parametrize("centred", (True, False))
@pytest.mark.filterwarnings("ignore")
def test_sae_lens_own_directory_becomes_ours(name, centred, tmp_path):
    library, torch = theirs()
    sae_class, cfg_class = library.registry.get_sae_class(name)
    extra = {"k": K, "rescale_acts_by_decoder_norm": centred} if name == "topk" else {}
    other = sae_class(cfg_class(d_in=D, d_sae=L, apply_b_dec_to_input=centred, **extra))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    other.save_model(tmp_path / "theirs")
    x = np.random.default_rng(0).normal(size=(30, D)).astype(np.float32)
    sae, params = sae_lens.load(tmp_path / "theirs")
    with torch.no_grad():
        expected = other.encode(torch.tensor(x)), other(torch.tensor(x))
    for ours, other in zip(run(sae, params, x), expected, strict=True):
        assert_same(ours, other.numpy())


@pytest.mark.filterwarnings("ignore")
def test_the_plugin_saves_what_it_loads_and_guards_the_order_of_latents(tmp_path):
    library, _ = theirs()
    sae, params, x = experts(gate="renorm", topk_scope="batch", balance_rate=1e-3)
    sae_lens.save(sae, params, tmp_path / "out")
    other = library.SAE.load_from_disk(tmp_path / "out")
    with pytest.raises(NotImplementedError, match="another order"):
        other.fold_W_dec_norm()
    other.save_model(tmp_path / "again")
    assert_same_function((sae, params), sae_lens.load(tmp_path / "again"), x)


def test_weights_by_hand():
    """The folded many-expert encoder, against the formulas in float64."""
    sae, params, x = experts(gate="prob", gate_at="code", input_scale=True)
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    cfg, t = sae_lens.describe(sae, params, {})
    assert (cfg["n_experts"], cfg["active"], cfg["d_sae"], cfg["gate_at"]) == (5, 2, L, "code")
    scale, n, m = p["scale"], 5, L // 5
    for i in range(n):
        low = p["w_enc"][i].mean(-1, keepdims=True)
        scaled = low + (1 + p["omega"][i]) * (p["w_enc"][i] - low)
        pre = (x - p["b_dec"]) / scale @ scaled + p["b_enc"][i]
        own = slice(i * m, (i + 1) * m)
        assert_same((x - t["b_dec"]) @ t["W_enc"][:, own] + t["b_enc"][own], scale * pre)
    logits = (x - p["b_router"]) / scale @ p["w_router"] + p["c_router"]
    assert_same((x - t["b_router_in"]) @ t["W_router"] + t["b_router_out"], logits)


@pytest.mark.parametrize("options", (dict(gate="one"), dict(gate="renorm", topk_scope="batch")))
def test_an_expert_alone_is_exact_on_its_tokens(options, tmp_path):
    sae, params, x = experts(active=1, **options)
    chosen = np.asarray(jax.jit(sae.route)(params, x).experts)[:, 0]
    (whole, x_hat), m = run(sae, params, x), L // 5
    for expert in np.unique(chosen):
        folder = tmp_path / f"expert_{expert}"
        sae_lens.save(sae, params, folder, expert=int(expert))
        alone, weights = sae_lens.load(folder)
        codes, alone_x_hat = run(alone, weights, x)
        mine = chosen == expert
        assert_same(codes[mine], whole[mine, expert * m : (expert + 1) * m])
        assert_same(alone_x_hat[mine], x_hat[mine])


@pytest.mark.parametrize(
    "active, options, reason",
    [
        (2, dict(gate="one"), "2 experts are active"),
        (1, dict(gate="prob"), "the router's probability"),
    ],
)
def test_an_expert_that_is_not_the_same_function_is_refused(active, options, reason, tmp_path):
    sae, params, _ = experts(active=active, **options)
    with pytest.raises(UserError, match=reason):
        sae_lens.save(sae, params, tmp_path / "out", expert=0)
    assert not (tmp_path / "out").exists()


def test_an_expert_that_is_not_there_is_refused(tmp_path):
    sae, params, _ = experts(active=1, gate="one")
    with pytest.raises(UserError, match="expert 5 is out of range: there are 0 to 4"):
        sae_lens.save(sae, params, tmp_path / "out", expert=5)
    sae, params, _ = plain("topk")
    with pytest.raises(UserError, match="'topk' has no experts"):
        sae_lens.save(sae, params, tmp_path / "out", expert=0)


def test_nothing_is_overwritten_and_nan_is_not_written(tmp_path):
    sae, params, _ = plain("topk")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        sae_lens.save(sae, params, tmp_path)
    broken = params | {"w_enc": params["w_enc"].at[0, 0].set(jnp.nan)}
    with pytest.raises(UserError, match="'W_enc' holds NaN"):
        sae_lens.save(sae, broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit(**changes):
    def change(folder):
        cfg = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(cfg | changes))

    return change


def tensors(change):
    def rewrite(folder):
        path = folder / "sae_weights.safetensors"
        save_file(change(load_file(path)), path)

    return rewrite


def cut(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def without(name):
    return tensors(lambda t: {n: a for n, a in t.items() if n != name})


OLD = {"sae_lens_version": "5.2.0"}
DAMAGE = [
    ("topk", edit(architecture="temporal"), "architecture 'temporal' is not read"),
    ("topk", edit(architecture=7), "architecture = 7 must be of type str"),
    ("topk", edit(metadata=OLD), "older than SAELens 6"),
    ("topk", edit(metadata=[]), "older than SAELens 6"),
    ("topk", edit(normalize_activations="layer_norm"), "normalize_activations = 'layer_norm'"),
    ("topk", edit(reshape_activations="hook_z"), "reshape_activations"),
    ("topk", edit(d_sae=10**12), r"'W_enc' has shape \(12, 40\)"),
    ("topk", edit(d_in=True), "d_in = True must be of type int"),
    ("topk", edit(k=0), "k = 0 must be at least 1"),
    ("topk", edit(k=L + 1), "k = 41 exceeds the 40 latents"),
    ("topk", edit(architecture="jumprelu"), "no tensor 'threshold'"),
    ("jumprelu", edit(architecture="standard"), "'threshold' that its architecture does not have"),
    ("topk", cut("sae_weights.safetensors", 900), "truncated, damaged or no safetensors"),
    ("topk", cut("sae_weights.safetensors", 0), "truncated, damaged or no safetensors"),
    ("topk", cut("cfg.json", 30), "not valid JSON"),
    ("topk", lambda folder: (folder / "cfg.json").write_text("[]"), "JSON object"),
    ("topk", lambda folder: (folder / "cfg.json").write_text("[" * 10**5), "not valid JSON"),
    ("topk", lambda folder: (folder / "cfg.json").unlink(), "has no cfg.json"),
    ("topk", without("W_dec"), "no tensor 'W_dec'"),
    ("topk", tensors(lambda t: t | {"W_enc": t["W_enc"] * np.float32(np.nan)}), "NaN or infinity"),
    ("experts", edit(gate="softmax"), "gate = 'softmax' must be one of prob"),
    ("experts", edit(active=6), "do not fit each other"),
    ("experts", edit(n_experts=4), r"'W_router' has shape \(12, 5\)"),
    ("experts", edit(topk_scope="batch"), "no tensor 'threshold'"),
    ("experts", edit(balanced=1), "balanced = 1 must be of type bool"),
]


@pytest.mark.parametrize("name, damage, reason", DAMAGE)
def test_damaged_directories_are_refused_in_one_line(name, damage, reason, tmp_path):
    sae, params, _ = made(name, {})
    sae_lens.save(sae, params, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=reason) as refused:
        sae_lens.load(tmp_path / "out")
    assert "\n" not in str(refused.value)
