"""The dashboard of a small run in headless Chromium: what its pages show, and safely."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from site_data import BREAKER, EVIL, read_data
from small_run import train_small

from scale_sae_jax import attach_run
from scale_sae_jax.report.dashboard import sentence
from scale_sae_jax.report.dashboard.site import script_json

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The dashboard of a small run whose text holds markup, and the run's folder."""
    folder = tmp_path_factory.mktemp("site")
    workdir = train_small(folder, words=(EVIL, BREAKER))
    command = [
        sys.executable, "-m", "experiments.dashboard", f"--workdir={workdir}", "--tokens=6000",
        f"--text=Assert {EVIL} now.", "--neuronpedia=small/4-scale",
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=280)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"{workdir}/dashboard/index.html  (64 latents" in done.stdout
    return workdir / "dashboard", workdir


@pytest.fixture(scope="module")
def seen(site):
    """What fires on the sentence that was given to the command."""
    return attach_run(site[1]).codes(f"Assert {EVIL} now.")


def test_the_command_shows_what_attach_finds(site, seen):
    folder, _ = site
    overview_, records = read_data(folder / "data")
    assert set(records) == set(range(64)) and EVIL in overview_["tokens"]
    text = (folder / "data" / "sentences.js").read_text().partition(" = ")[2].rstrip(";\n")
    assert json.loads(text) == [json.loads(script_json(sentence(f"Assert {EVIL} now.", seen)))]
    assert len(json.loads((folder / "neuronpedia/batch-0.json").read_text())["features"]) == 64


def test_pages_are_whole_without_a_network(site):
    for page in site[0].glob("*.*"):
        text = page.read_text()
        text = text.replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
        assert "http:" not in text and "https:" not in text
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text
        if page.suffix == ".html":
            assert "default-src 'none'; script-src 'self'; style-src 'self'" in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
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
        p.replace("\n", "↵").replace("\t", "→") if p.strip(" ") else "␣" for p in promoted
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


def test_a_sentence_and_the_experts_are_on_the_overview(visit, site, seen):
    overview_, _ = read_data(site[0] / "data")
    page = visit("index.html")
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
    tokens = [overview_["tokens"][t] for t in overview_["experts"][2]["tokens"]]
    expected = [token.replace("\n", "↵") if token.strip(" ") else "␣" for token in tokens]
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
                [style("a.chip, .moves a").color, card],
                [style(".about").color, style("body").backgroundColor],
                [style("body").color, getComputedStyle(full).backgroundColor]];
    """)
    assert min(contrast(*pair) for pair in colours) >= 4.5, colours
    back = [int(p) for p in colours[0][1][4:-1].split(",")]
    assert (max(back) < 60) == (scheme == "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
