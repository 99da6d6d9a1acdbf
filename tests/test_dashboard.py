"""The dashboard of a small run: its files against what was found, and its pages in a browser."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import train_small

from scale_sae_jax import UserError, attach_run
from scale_sae_jax.inspection import Findings
from scale_sae_jax.inspection.bands import bands, peak_tokens
from scale_sae_jax.inspection.contexts import OUTSIDE, Plan, nothing_read, read
from scale_sae_jax.inspection.directions import Nearest, Plane
from scale_sae_jax.inspection.profiles import Profile
from scale_sae_jax.inspection.vocabulary import Words
from scale_sae_jax.interop import neuronpedia
from scale_sae_jax.report.dashboard import About, sentence, tokens_named, write_site
from scale_sae_jax.report.dashboard.data import rounded
from scale_sae_jax.report.dashboard.site import script_json

ROOT = Path(__file__).parent.parent
EVIL = "<img src=x onerror=alert(1)>"
BREAKER = "</script><script>alert(2)</script>\u2028"


class Strings:
    """A tokenizer's side that pages need: token 7 is markup, others are words."""

    def token_string(self, token):
        return EVIL if token == 7 else f" word{token}"


def found(latents=8, experts=2, rows=20, slots=4, plan=Plan(top=3, sampled=9), vocab=50):
    """Findings of random codes; the last latent never fires."""
    rng = np.random.default_rng(0)
    ids = rng.random((rows, 32, latents - 1)).argsort(-1)[..., :slots]
    values = rng.gamma(2, 3, ids.shape).astype(np.float32)
    tokens, ones = rng.integers(0, vocab, (rows, 32)), np.ones((rows, 32), int)
    seen = read(nothing_read(latents, plan), plan, values, ids, ones > 0, tokens, ones)
    few, many = np.arange(latents)[:, None] + np.arange(2), rng.normal(size=(latents, 2))
    words = Words(few % vocab, many, (few + 5) % vocab, -many)
    cosines = rng.random((latents, 2))
    near = Nearest(few % latents, cosines, np.full((latents, 2), -1), 0 * cosines)
    profiles = [Profile(0.5, [7, 3], [0.25, 0.125], [3.0, 2.0])] * experts
    return Findings(plan, seen, words, near, Plane(rng.uniform(-1, 1, (latents, 2)), 0.4), profiles)


def about(latents=8, experts=2):
    return About("a run", "a model", 3, "scale", latents, experts, 1, 4, "a text")


def written(folder, findings, ids=None, **sizes):
    """The values of a site's data files."""
    ids = np.arange(len(findings.contexts.firing)) if ids is None else np.array(ids)
    tokens = tokens_named(findings, Strings())
    size = write_site(folder, findings, about(**sizes), tokens, ids, [])
    assert size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return read_data(folder / "data")


def read_data(folder):
    values = {}
    for path in folder.glob("*.js"):
        head, _, value = path.read_text().partition(" = ")
        values[path.stem] = json.loads(value.rstrip(";\n"))
    records = {k: v for name, part in values.items() if name[:8] == "latents-" for k, v in part.items()}
    return values["overview"], {int(latent): record for latent, record in records.items()}


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
    assert [strings[t] for t in overview_["experts"][0]["tokens"]] == [EVIL, " word3"]
    for latent, record in records.items():
        top = seen.top.of(latent)
        assert record["firing"] == seen.firing[latent] == sum(record["histogram"])
        assert lines["largest"][latent] == (rounded(top.value[0]) if latent < 7 else 0)
        for (place, tokens, acts), peak in zip(record["top"], range(len(top.value)), strict=True):
            inside = top.tokens[peak] != OUTSIDE
            expected = [Strings().token_string(t) for t in top.tokens[peak][inside]]
            assert [strings[t] for t in tokens] == expected
            assert acts == rounded(top.acts[peak][inside])
            assert acts[place] == rounded(top.value[peak]) == max(acts)
        assert record["intra"][0] == [latent, (latent + 1) % 8] and record["inter"] == [[], []]
        assert [strings[t] for t in record["promoted"][0]] == [
            Strings().token_string(t) for t in (latent, latent + 1)
        ]
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


def test_a_smaller_site_replaces_the_larger_ones_records(tmp_path):
    findings = found(latents=200)
    assert len(written(tmp_path, findings, latents=200)[1]) == 200
    (tmp_path / "notes.txt").touch()
    overview_, records = written(tmp_path / ".", found(latents=200), [3, 70], latents=200) \
        if not (tmp_path / "notes.txt").unlink() else None
    assert set(records) == {3, 70} and overview_["latents"]["id"] == [3, 70]
    with pytest.raises(UserError, match="choose another --to"):
        (tmp_path / "file").touch()
        write_site(tmp_path / "file", findings, about(200), tokens_named(findings, Strings()),
                   np.arange(3), [])


def test_2000_latents_stay_under_30_mb(tmp_path):
    findings = found(latents=2000, rows=300, slots=100, plan=Plan(), vocab=49_000)
    assert np.bincount(findings.contexts.top.latent)[:1999].min() == 10
    written(tmp_path, findings, latents=2000)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.*")) < 30e6


def test_neuronpedia_batches(tmp_path):
    findings = found(latents=200)
    ids = np.arange(60, 200)
    assert neuronpedia.write_batches(tmp_path, findings, Strings(), ids, "m", 3, "set") == 2
    batches = [json.loads((tmp_path / f"batch-{i}.json").read_text()) for i in range(2)]
    assert [len(batch["features"]) for batch in batches] == [128, 12]
    assert (batches[1]["model_id"], batches[1]["layer"], batches[1]["sae_set"]) == ("m", 3, "set")
    features = {f["feature_index"]: f for batch in batches for f in batch["features"]}
    assert list(features) == ids.tolist() and features[199]["activations"] == []
    seen, feature = findings.contexts, features[61]
    assert feature["frac_nonzero"] == seen.firing[61] / seen.tokens
    assert feature["pos_str"] == [" word11", " word12"] and feature["neg_str"][0] == " word16"
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
    assert sampled and all(
        c["bin_min"] - 1e-3 <= max(c["values"]) <= c["bin_max"] + 1e-3 and c["bin_contains"] == 1 / 3
        for c in sampled
    )


# In a browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The dashboard of a small run whose text holds markup, and the run's folder."""
    folder = tmp_path_factory.mktemp("site")
    workdir = train_small(folder, words=(EVIL, BREAKER))
    command = [
        sys.executable, "-m", "experiments.dashboard", f"--workdir={workdir}", "--tokens=6000",
        f"--text=Assert {EVIL} now.", "--neuronpedia=small/4-scale",
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=280)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"{workdir}/dashboard/index.html  (64 latents" in done.stdout
    return workdir / "dashboard", workdir


def test_the_command_shows_what_attach_finds(site):
    folder, workdir = site
    overview_, records = read_data(folder / "data")
    assert set(records) == set(range(64)) and EVIL in overview_["tokens"]
    text = (folder / "data" / "sentences.js").read_text().partition(" = ")[2].rstrip(";\n")
    seen = attach_run(workdir).codes(f"Assert {EVIL} now.")
    assert json.loads(text) == [json.loads(script_json(sentence(f"Assert {EVIL} now.", seen)))]
    assert len(json.loads((folder / "neuronpedia/batch-0.json").read_text())["features"]) == 64


def test_pages_are_whole_without_a_network(site):
    for page in site[0].glob("*.*"):
        text = page.read_text()
        assert "http:" not in text.replace("http://www.w3.org/2000/svg", "") and "https:" not in text
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text
        if page.suffix == ".html":
            assert "default-src 'none'; script-src 'self'; style-src 'self'" in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs Chromium and its chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = """headless=new no-sandbox disable-gpu disable-quic no-first-run
        disable-background-networking disable-component-update disable-sync window-size=1200,900"""
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def visit(browser, site):
    """Opens a page and waits until it is drawn; afterwards the console must be empty."""
    from selenium.webdriver.support.ui import WebDriverWait

    def go(page):
        browser.get("about:blank")
        browser.get(f"file://{site[0]}/{page}")
        wait("return document.querySelector('main h1') !== null")
        return browser

    def wait(script):
        return WebDriverWait(browser, 60).until(lambda b: b.execute_script(script))

    go.wait = wait
    yield go
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.images.length") == 0


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def texts(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return browser.execute_script(script, selector)


def test_a_latents_page_shows_its_contexts_and_arrows_move_on(visit, site):
    overview_, records = read_data(site[0] / "data")
    live = [i for i in range(63) if records[i]["bands"]][0]
    page, strings = visit(f"latent.html#{live}"), overview_["tokens"]
    visit.wait("return document.querySelector('.context') !== null")
    assert texts(page, "h1") == [f"Latent {live}"]
    shown = [c for c in [*records[live]["top"], *(c for b in records[live]["bands"]
                                                  for c in b["contexts"])]]
    lines = page.execute_script(
        "return [...document.querySelectorAll('.context')].map((line) => [...line.childNodes]"
        ".slice(1).map((node) => node.textContent).join(''))"
    )
    plain = [line.replace("↵", "\n") for line in lines]
    assert plain == ["".join(strings[t] for t in tokens) for _, tokens, _ in shown]
    peaks = [strings[tokens[place]].strip() for place, tokens, _ in shown]
    assert [t.strip() for t in texts(page, ".token.peak")] == [p.replace("\n", "↵") for p in peaks]
    promoted = [strings[t] for t in records[live]["promoted"][0]]
    assert texts(page, ".pair > div:first-child code") == [
        p.replace("\n", "↵").replace("\t", "→") for p in promoted
    ]
    press(page, "\ue014")  # right arrow
    visit.wait(f"return document.querySelector('h1').textContent === 'Latent {live + 1}'")
    press(page, "\ue012")
    visit.wait(f"return document.querySelector('h1').textContent === 'Latent {live}'")


def test_search_finds_latents_by_token_and_by_id(visit, site):
    overview_, _ = read_data(site[0] / "data")
    strings, peaks = overview_["tokens"], overview_["latents"]["peaks"]
    page = visit("index.html")
    token = next(strings[p[0]].strip() for p in peaks if p and strings[p[0]].strip().isalpha())
    press(page, "/")
    assert page.execute_script("return document.activeElement.id") == "search"
    press(page, token)
    links = page.execute_script(
        "return [...document.querySelectorAll('.results a')].map((a) => a.hash.slice(1))"
    )
    first = [i for i, p in enumerate(peaks) if p and strings[p[0]].strip().lower() == token.lower()]
    assert set(map(int, links[: len(first)])) == set(first)
    press(page, "\ue007")  # enter
    visit.wait(f"return document.querySelector('h1').textContent === 'Latent {links[0]}'")
    press(page, "/", "17", "\ue007")
    visit.wait("return document.querySelector('h1').textContent === 'Latent 17'")
    press(page, "/", "no such token")
    assert texts(page, ".results") == ["No latent peaks on this or promotes it."]


def test_markup_in_tokens_is_shown_as_text(visit, site):
    overview_, records = read_data(site[0] / "data")
    evil, breaker = (overview_["tokens"].index(word) for word in (EVIL, BREAKER))
    page = visit("index.html")
    assert EVIL in texts(page, "main code") and not texts(page, "main img")
    press(page, "/", "onerror")
    assert any(EVIL in line for line in texts(page, ".results a"))
    holds = {word: next(i for i, r in records.items() if any(word in c[1] for c in r["top"]))
             for word in (evil, breaker)}
    for word, latent in holds.items():
        page = visit(f"latent.html#{latent}")
        visit.wait("return document.querySelector('.context') !== null")
        assert overview_["tokens"][word].strip() in [t.strip() for t in texts(page, ".token")]
        assert page.execute_script("return document.scripts.length") == 4


def test_a_sentence_and_the_experts_are_on_the_overview(visit, site):
    overview_, _ = read_data(site[0] / "data")
    page = visit("index.html")
    seen = attach_run(site[1]).codes(f"Assert {EVIL} now.")
    rows = page.execute_script(
        "return [...document.querySelectorAll('main section')].find((s) => s.textContent.includes("
        "'this sentence')).querySelectorAll('tbody tr').length"
    )
    assert rows == len(seen.tokens)
    strongest = list(seen.latents(1))[0]
    links = page.execute_script(
        "return [...document.querySelectorAll('a.chip')].map((a) => a.getAttribute('href'))"
    )
    assert f"latent.html#{strongest}" == links[0]
    page = visit("expert.html#2")
    ids = page.execute_script(
        "return [...document.querySelectorAll('a.chip')].map((a) => a.hash.slice(1))"
    )
    assert sorted(map(int, ids)) == list(range(32, 48))
    expected = [overview_["tokens"][t].replace("\n", "↵") for t in overview_["experts"][2]["tokens"]]
    assert texts(page, ".grid > section:last-child code") == expected


def test_unknown_latents_are_told(visit):
    page = visit("latent.html#9999")
    assert texts(page, "h1") == ["No such latent"]


@pytest.mark.parametrize("page", ["index.html", "latent.html#1", "expert.html#0"])
def test_a_phone_needs_no_sideways_scrolling(visit, browser, page):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        visit(page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def contrast(first, second):
    def luminance(colour):
        parts = [int(p) / 255 for p in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(visit, browser, scheme):
    """WCAG AA: 4.5, on the most strongly shaded token too."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page = visit("latent.html#1")
    visit.wait("return document.querySelector('.context, .bars, h3') !== null")
    colours = page.execute_script("""
        const full = document.createElement("span");
        full.className = "token";
        full.style.setProperty("--a", 1);
        document.querySelector(".card").append(full);
        const style = (query) => getComputedStyle(document.querySelector(query));
        const card = style(".card").backgroundColor;
        return [[style("body").color, card], [style(".note").color, card],
                [style("a.chip, .moves a").color, card], [style(".about").color, style("body").backgroundColor],
                [style("body").color, getComputedStyle(full).backgroundColor]];
    """)
    assert min(contrast(*pair) for pair in colours) >= 4.5, colours
    back = [int(p) for p in colours[0][1][4:-1].split(",")]
    assert (max(back) < 60) == (scheme == "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
