"""Text through a small model with an autoencoder, against the same steps by hand in NumPy."""

import functools
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import WIDTH, write_model

from scale_sae_jax import UserError, attach, attach_run
from scale_sae_jax.config import ActivationsConfig, LMConfig
from scale_sae_jax.lm import load_language_model
from scale_sae_jax.sae import build
from scale_sae_jax.sae.presets import preset

TEXT = "The assert statement is a convenient way to insert debugging assertions."


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    write_model(folder, [text[:2000] for text in topics.values()])
    return load_language_model(LMConfig(path=str(folder)))


@pytest.fixture(scope="module", params=["paper", "relu"])
def attached(lm, request):
    """On block 0, with a limit that the largest of the text's activations exceeds."""
    config = preset(request.param, latents=64, experts=4, active=2, k=8, match="width")
    sae = build(config, WIDTH)
    params = sae.init(jax.random.key(0))
    norms = np.linalg.norm(stream(attach(lm, sae, params, 0))[0], axis=-1)
    return attach(lm, sae, params, 0, max_norm=float(np.sort(norms[1:])[-2:].mean()))


@functools.cache
def stream(attached):
    """The activations [S, D] of the text and the ids of its tokens, BOS before it."""
    lm = attached.lm
    ids = np.array([[lm.tokenizer.bos_id, *lm.tokenizer.encode_batch([TEXT])[0]]], np.int32)
    return np.asarray(lm.run_to(lm.params, ids, np.ones_like(ids), attached.layer))[0], ids[0]


@functools.cache
def dense(attached):
    """Codes as [S, L], decoder rows [L, D] and b_dec."""
    x = stream(attached)[0]
    codes = attached.sae.encode(attached.params, x)
    out = np.zeros((len(x), attached.sae.latents), np.float32)
    np.add.at(out, (np.arange(len(x))[:, None], codes.ids), codes.values)
    return out, np.asarray(attached.sae.decoder(attached.params)), attached.params["b_dec"]


def logits(attached, x, changed):
    """Of the model run on from `changed` where positions are kept, and from x elsewhere."""
    kept = np.linalg.norm(x, axis=-1) <= attached.max_norm
    kept[0] = False
    assert 0 < (~kept).sum() < len(x)
    x = np.where(kept[:, None], changed, x)[None].astype(np.float32)
    ones = np.ones(x.shape[:2], np.int32)
    return run_on(attached.lm, x, ones)


def run_on(lm, x, segments):
    """The rest of the model, after block 0."""
    return np.asarray(jax.jit(lm.run_from, static_argnums=3)(lm.params, x, segments, 0))[0]


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_codes_of_a_text(attached):
    x, ids = stream(attached)
    seen = attached.codes(TEXT)
    assert seen.tokens.tolist() == ids.tolist()
    assert seen.strings[0] == "<|endoftext|>" and "".join(seen.strings[1:]) == TEXT
    kept = np.linalg.norm(x, axis=-1) <= attached.max_norm
    kept[0] = False
    np.testing.assert_array_equal(seen.kept, kept)
    expected = dense(attached)[0]
    for position, row in enumerate(expected):
        latents = seen.latents(position)
        assert set(latents) == (set(np.flatnonzero(row)) if kept[position] else set())
        assert list(latents.values()) == sorted(latents.values(), reverse=True)
        close([latents[i] for i in latents], row[list(latents)])
    routed = attached.sae.route(attached.params, x).experts
    np.testing.assert_array_equal(seen.experts, routed)


def test_clean_logits_are_the_models_own(attached):
    x, _ = stream(attached)
    close(attached.logits(TEXT), logits(attached, x, x))


def test_splice_runs_on_from_the_reconstruction(attached):
    x, _ = stream(attached)
    codes, rows, b_dec = dense(attached)
    spliced = attached.logits(TEXT, splice=True)
    close(spliced, logits(attached, x, codes @ rows + b_dec))
    assert np.abs(spliced - attached.logits(TEXT)).max() > 0.01


def test_ablation_takes_the_latents_part_away_and_leaves_the_error(attached):
    x, _ = stream(attached)
    codes, rows, b_dec = dense(attached)
    first, second = np.argsort(-codes.sum(0))[:2].tolist()
    parts = codes[:, [first, second]] @ rows[[first, second]]
    ablated = attached.logits(TEXT, ablate=[first, second])
    close(ablated, logits(attached, x, x - parts))
    assert np.abs(ablated - attached.logits(TEXT)).max() > 0.01
    both = attached.logits(TEXT, splice=True, ablate={first, second})
    close(both, logits(attached, x, codes @ rows + b_dec - parts))
    never = np.flatnonzero(codes.sum(0) == 0)
    if len(never):
        close(attached.logits(TEXT, ablate=[int(never[0])]), logits(attached, x, x))


def test_steering_adds_multiples_of_directions(attached):
    x, _ = stream(attached)
    rows = dense(attached)[1]
    steered = attached.logits(TEXT, steer={5: 3.0, 40: -2.0})
    close(steered, logits(attached, x, x + 3 * rows[5] - 2 * rows[40]))
    likeliest = attached.predict(TEXT, n=3, steer={5: 3.0, 40: -2.0})
    probs = np.exp(steered[-1]) / np.exp(steered[-1]).sum()
    order = np.argsort(-probs)[:3]
    assert [word for word, _ in likeliest] == [
        attached.lm.tokenizer.token_string(i) for i in order.tolist()
    ]
    close([p for _, p in likeliest], probs[order])


def test_latents_come_in_any_collection_and_few_numbers_of_them_are_compiled(attached):
    three = attached.logits(TEXT, ablate=[5, 40, 41], steer={7: 2.0, 9: 1.0, 11: -1.0})
    compiled = attached._edited._cache_size()
    for ids in ({5, 40, 41}, np.array([[5, 40, 41]]), jnp.array([5, 40, 41]), [5, 40, 41, 41]):
        close(attached.logits(TEXT, ablate=ids, steer={7: 2.0, 9: 1.0, 11: -1.0}), three)
    assert attached._edited._cache_size() == compiled
    fired = int(attached.codes(TEXT).codes.ids[-1, 0])
    one = attached.logits(TEXT, ablate=[fired])
    assert abs(one - attached.logits(TEXT)).max() > 0
    close(attached.logits(TEXT, ablate=np.array([fired])), one)
    first = attached.logits(TEXT, ablate=[0])
    close(attached.logits(TEXT, ablate=np.array([0])), first)


def test_masks_that_are_off_let_position_0_be_edited(attached):
    x, _ = stream(attached)
    rows = dense(attached)[1]
    masks = ActivationsConfig(drop_position_0=False, drop_special=False)
    all_of_them = attach(attached.lm, attached.sae, attached.params, 0, masks=masks)
    ones = np.ones((1, len(x)), np.int32)
    expected = run_on(attached.lm, (x + rows[1])[None], ones)
    close(all_of_them.logits(TEXT, steer={1: 1.0}), expected)
    assert all_of_them.codes(TEXT).kept.all()


def test_mistakes(attached, tmp_path):
    lm, sae, params = attached.lm, attached.sae, attached.params
    with pytest.raises(UserError, match="no latent 64: ids are 0 to 63"):
        attached.logits(TEXT, ablate=[64])
    with pytest.raises(UserError, match="no latent -1"):
        attached.predict(TEXT, steer={-1: 1.0})
    with pytest.raises(UserError, match="multiples must be finite"):
        attached.logits(TEXT, steer={3: np.nan})
    with pytest.raises(UserError, match="finite float32 numbers"):
        attached.logits(TEXT, steer={3: 1e39})
    with pytest.raises(UserError, match="no latent 'a'"):
        attached._ids(["a"])
    with pytest.raises(UserError, match="n = -1"):
        attached.predict(TEXT, n=-1)
    for no_text in (["The cell", "divides"], 5, b"cell"):
        with pytest.raises(UserError, match="is no text: give one string"):
            attached._row(no_text)
    with pytest.raises(UserError, match="no tokens"):
        attached.codes("")
    with pytest.raises(UserError, match="takes 64: shorten it"):
        attached.codes(TEXT * 9)
    with pytest.raises(UserError, match="no layer 2: it has layers 0 to 1"):
        attach(lm, sae, params, 2)
    with pytest.raises(UserError, match="width 8, those of .* have 32"):
        attach(lm, build(sae.config, 8), params, 0)
    with pytest.raises(UserError, match="config.json"):
        attach_run(tmp_path)
