"""The files of a dashboard, and Neuronpedia's, against what was found."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from site_data import BREAKER, EVIL, read_data
from tokenizers.models import WordLevel

from scale_sae_jax import UserError
from scale_sae_jax.inspection import Findings
from scale_sae_jax.inspection.bands import bands, peak_tokens
from scale_sae_jax.inspection.contexts import OUTSIDE, Plan, nothing_read, read
from scale_sae_jax.inspection.directions import Nearest, Plane
from scale_sae_jax.inspection.profiles import Profile
from scale_sae_jax.inspection.vocabulary import Words
from scale_sae_jax.interop import neuronpedia
from scale_sae_jax.report.dashboard import About, tokens_named, write_site
from scale_sae_jax.report.dashboard.data import rounded
from scale_sae_jax.report.dashboard.site import script_json
from scale_sae_jax.text.tokenizers import Tokenizer


def words(vocab):
    """A tokenizer of words; token 7 is markup."""
    names = {EVIL if i == 7 else f"word{i}": i for i in range(vocab)}
    backend = tokenizers.Tokenizer(WordLevel(names, "word0"))
    return Tokenizer(backend, 0, frozenset(), vocab, "words")


def found(latents=8, experts=2, rows=20, slots=4, plan=Plan(top=3, sampled=9), vocab=50):
    """Findings of random codes; the last latent never fires."""
    rng = np.random.default_rng(0)
    ids = rng.random((rows, 32, latents - 1)).argsort(-1)[..., :slots]
    values = rng.gamma(2, 3, ids.shape).astype(np.float32)
    tokens, ones = rng.integers(0, vocab, (rows, 32)), np.ones((rows, 32), int)
    seen = read(nothing_read(latents, plan), plan, values, ids, ones > 0, tokens, ones)
    few, many = np.arange(latents)[:, None] + np.arange(2), rng.normal(size=(latents, 2))
    ends = Words(few % vocab, many, (few + 5) % vocab, -many)
    cosines = rng.random((latents, 2))
    near = Nearest(few % latents, cosines, np.full((latents, 2), -1), 0 * cosines)
    profiles = [Profile(0.5, [7, 3], [0.25, 0.125], [3.0, 2.0])] * experts
    plane = Plane(rng.uniform(-1, 1, (latents, 2)), 0.4)
    return Findings(plan, seen, ends, near, plane, profiles)


def named(ids):
    return [EVIL if i == 7 else f"word{i}" for i in ids]


def about(latents=8, experts=2):
    return About("a run", "a model", 3, "scale", latents, experts, 1, 4, "a text")


def written(folder, findings, ids=None, **sizes):
    """The values of the data files of a site that is written to a folder."""
    ids = np.arange(len(findings.contexts.firing)) if ids is None else np.array(ids)
    tokens = tokens_named(findings, words(50_000))
    size = write_site(folder, findings, about(**sizes), tokens, ids, [])
    assert size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return read_data(folder / "data")


@given(st.recursive(st.text() | st.sampled_from([EVIL, BREAKER, "<!--"]),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_in_scripts_is_inert_and_says_the_same(value):
    text = script_json(value)
    assert text.isascii() and not set("<>&") & set(text) and json.loads(text) == value


def test_numbers_that_json_has_not_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        script_json(float("nan"))


def test_files_hold_what_was_found(tmp_path):
    findings = found()
    seen, overview_, records = findings.contexts, *written(tmp_path, findings)
    strings, lines = overview_["tokens"], overview_["latents"]
    assert lines["id"] == list(range(8)) and overview_["about"]["size"] == 4
    assert lines["density"] == rounded(seen.firing / seen.tokens)
    assert overview_["density"]["dead"] == 1 / 8 and overview_["experts"][1]["live"] == 3
    assert [strings[t] for t in overview_["experts"][0]["tokens"]] == named([7, 3])
    for latent, record in records.items():
        top = seen.top.of(latent)
        assert record["firing"] == seen.firing[latent] == sum(record["histogram"])
        assert lines["largest"][latent] == (rounded(top.value[0]) if latent < 7 else 0)
        for (place, tokens, acts), peak in zip(record["top"], range(len(top.value)), strict=True):
            inside = top.tokens[peak] != OUTSIDE
            assert [strings[t] for t in tokens] == named(top.tokens[peak][inside])
            assert acts == rounded(top.acts[peak][inside])
            assert acts[place] == rounded(top.value[peak]) == max(acts)
        assert record["intra"][0] == [latent, (latent + 1) % 8] and record["inter"] == [[], []]
        assert [strings[t] for t in record["promoted"][0]] == named([latent, latent + 1])
    assert records[7]["top"] == records[7]["bands"] == records[7]["histogram"] == []


def test_bands_split_the_sample_and_repeat_no_top_context():
    findings = found(rows=40)
    for latent in range(7):
        top, sample = (p.of(latent) for p in (findings.contexts.top, findings.contexts.sample))
        thirds = bands(sample, top)
        assert [band.name for band in thirds] == ["strong", "middling", "weak"]
        values = np.sort(sample.value)[::-1]
        for i, band in enumerate(thirds):
            third = values[3 * i : 3 * i + 3]
            assert (band.low, band.high, band.share) == (third[-1], third[0], 1 / 3)
            assert set(band.contexts.value) <= set(third)
        shown = {(r, p) for band in thirds for r, p in zip(*band.contexts[2:4], strict=True)}
        largest = set(zip(top.row, top.position, strict=True))
        assert not shown & largest
        assert shown | largest >= set(zip(sample.row, sample.position, strict=True))


def test_peak_tokens_come_by_how_often():
    top = found(rows=60, plan=Plan(top=30), vocab=4).contexts.top.of(0)
    tokens = top.tokens[:, Plan().before].tolist()
    expected = sorted(set(tokens), key=lambda t: (-tokens.count(t), tokens.index(t)))
    assert peak_tokens(top, Plan().before).tolist() == expected


def test_a_smaller_site_takes_the_place_of_a_larger_one(tmp_path):
    findings = found(latents=200)
    assert len(written(tmp_path, findings, latents=200)[1]) == 200
    overview_, records = written(tmp_path, findings, [3, 70], latents=200)
    assert set(records) == {3, 70} and overview_["latents"]["id"] == [3, 70]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="name another folder"):
        written(tmp_path / "file", found())
    with pytest.raises(UserError, match="is not empty"):
        written(tmp_path, found())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_2000_latents_stay_under_30_mb(tmp_path):
    """Ten times a site of 200 with all their contexts, pages and token table counted ten times."""
    findings = found(latents=200, rows=120, slots=20, plan=Plan(), vocab=3000)
    assert np.bincount(findings.contexts.top.latent)[:199].min() == 10
    written(tmp_path, findings, latents=200)
    assert 10 * sum(path.stat().st_size for path in tmp_path.rglob("*.*")) < 30e6


def test_neuronpedia_batches(tmp_path):
    findings = found(latents=200, rows=80)
    ids = np.arange(60, 200)
    assert neuronpedia.write_batches(tmp_path, findings, words(50), ids, "m", 3, "set") == 2
    batches = [json.loads((tmp_path / f"batch-{i}.json").read_text()) for i in range(2)]
    assert [len(batch["features"]) for batch in batches] == [128, 12]
    assert (batches[1]["model_id"], batches[1]["layer"], batches[1]["sae_set"]) == ("m", 3, "set")
    features = {f["feature_index"]: f for batch in batches for f in batch["features"]}
    assert list(features) == ids.tolist() and features[199]["activations"] == []
    seen, feature = findings.contexts, features[61]
    assert feature["frac_nonzero"] == seen.firing[61] / seen.tokens
    assert feature["pos_str"] == named([11, 12]) and feature["neg_str"] == named([16, 17])
    heights, centres = feature["freq_hist_data_bar_heights"], feature["freq_hist_data_bar_values"]
    assert sum(heights) == seen.firing[61] and len(heights) == len(centres) == 32
    assert centres[0] == pytest.approx(2.0 ** seen.exponent[61] / 64, abs=1e-4)
    top = seen.top.of(61)
    for context, value in zip(feature["activations"], top.value, strict=False):
        assert context["bin_min"] == context["bin_contains"] == -1
        assert context["bin_max"] == pytest.approx(top.value[0])
        at = context["qualifying_token_index"]
        assert context["values"][at] == max(context["values"]) == pytest.approx(value, abs=1e-4)
        assert len(context["tokens"]) == len(context["values"])
    sampled = feature["activations"][len(top.value) :]
    assert sampled and {c["bin_contains"] for c in sampled} == {1 / 3}
    for c in sampled:
        assert c["bin_min"] - 1e-3 <= max(c["values"]) <= c["bin_max"] + 1e-3


def test_fewer_neuronpedia_batches_take_the_place_of_more(tmp_path):
    findings = found(latents=200)
    (tmp_path / "notes.json").touch()
    for latents, files in ((np.arange(200), 2), (np.arange(3), 1)):
        count = neuronpedia.write_batches(tmp_path, findings, words(50), latents, "m", 3, "set")
        names = {path.name for path in tmp_path.iterdir()}
        assert count == files
        assert names == {"notes.json", *(f"batch-{i}.json" for i in range(files))}
