// What all pages share: elements, tokens, bars, the header with its search, and keys.
// Text from the model and the corpus only ever becomes text: textContent and attributes, no markup.
"use strict";

const dashboard = { overview: null, sentences: [], shards: {} };

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 0.001 && size < 1e6 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

const percent = (value) => `${number(100 * value)} %`;
const table = () => dashboard.overview.tokens;
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/\r/g, "␍");
const spaces = (text) => (text.trim() ? text : text.replace(/ /g, "␣"));

// A token by its string, in a box that shows its spaces.
function boxed(text) {
  return element("code", { className: "token", title: text }, visible(spaces(text)) || "∅");
}

// A window of text, shaded by activation as a share of `most`.
function context([peak, tokens, acts], most) {
  const line = element("div", { className: "context" });
  line.append(element("span", { className: "value" }, number(acts[peak])));
  tokens.forEach((token, i) => {
    const text = table()[token], rest = text.trimStart() || text;
    const span = element("span", { className: i === peak ? "token peak" : "token" }, visible(rest));
    if (acts[i]) {
      span.style.setProperty("--a", Math.max(0.12, Math.min(1, acts[i] / most)));
      span.title = `${text}: ${number(acts[i])}`;
    }
    line.append(visible(text.slice(0, text.length - rest.length)), span);  // spaces stay unshaded
  });
  return line;
}

function card(title, note, ...children) {
  const parts = note ? [element("p", { className: "note" }, note)] : [];
  return element("section", { className: "card" }, element("h2", {}, title), ...parts, ...children);
}

function facts(pairs) {
  const list = element("dl", { className: "facts" });
  for (const [name, value] of pairs) {
    list.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }
  return list;
}

// Rows of cells under headings; headings that start with "#" are of numbers.
function grid(headings, rows) {
  const kinds = headings.map((name) => (name.startsWith("#") ? "number" : ""));
  const cells = (name, values) => element("tr", {}, ...values.map((value, i) =>
    element(name, { className: kinds[i] }, value)));
  const head = element("thead", {}, cells("th", headings.map((name) => name.replace("#", ""))));
  const body = element("tbody", {}, ...rows.map((row) => cells("td", row)));
  return element("div", { className: "scroll" }, element("table", {}, head, body));
}

// Bars of counts over equal steps. ticks: [share of the width, label]. title: of each bar.
function bars(counts, ticks, title, label) {
  const drawing = (name, options) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(options)) made.setAttribute(key, value);
    return made;
  };
  const most = Math.max(1, ...counts);
  const svg = drawing("svg", {
    viewBox: `0 0 ${counts.length} 100`, preserveAspectRatio: "none", role: "img", "aria-label": label,
  });
  counts.forEach((count, i) => {
    const tall = count ? Math.max(1.2, (count / most) * 98) : 0;
    const bar = drawing("rect", { x: i + 0.04, y: 100 - tall, width: 0.92, height: tall });
    bar.append(drawing("title", {}));
    bar.firstChild.textContent = title(i);
    svg.append(bar);
  });
  const scale = element("div", { className: "ticks" }, ...ticks.map(([share, text]) => {
    const tick = element("span", { className: share < 0.04 ? "first" : share > 0.96 ? "last" : "" }, text);
    tick.style.left = `${100 * share}%`;
    return tick;
  }));
  return element("div", { className: "bars" }, element("div", { className: "plot" }, svg), scale);
}

// Where a latent's line in the overview is; undefined if this dashboard has no page of it.
const place = (() => {
  let places = null;
  return (id) => {
    places ??= new Map(dashboard.overview.latents.id.map((value, i) => [value, i]));
    return places.get(id);
  };
})();

const expertOf = (id) => Math.floor(id / dashboard.overview.about.size);
const peakTokens = (i) => dashboard.overview.latents.peaks[i].map((token) => table()[token]);

// A latent by number, with the token it peaks on most often.
function latentLink(id) {
  const at = place(id);
  if (at === undefined) return element("span", { className: "chip" }, String(id));
  const link = element("a", { className: "chip", href: `latent.html#${id}` }, String(id));
  const [first] = peakTokens(at);
  if (first !== undefined) link.append(boxed(first));
  return link;
}

const expertLink = (expert) => element("a", { href: `expert.html#${expert}` }, `expert ${expert}`);

// Latents with this id, or with a token that has this text: equal before part of, peaks before
// promoted, and then those that fire more often.
function search(query) {
  const { latents } = dashboard.overview, found = [];
  const wanted = query.trim().toLowerCase();
  if (!wanted) return found;
  const lower = (search.lower ??= table().map((token) => token.trim().toLowerCase()));
  const rank = (tokens) => {
    const equal = tokens.findIndex((token) => lower[token] === wanted);
    if (equal >= 0) return equal;
    const part = tokens.findIndex((token) => lower[token].includes(wanted));
    return part >= 0 ? 10 + part : Infinity;
  };
  latents.id.forEach((id, i) => {
    const peaks = rank(latents.peaks[i]), promoted = rank(latents.promoted[i]);
    const best = String(id) === wanted.replace("#", "") ? -1 : Math.min(peaks, 20 + promoted);
    if (best < Infinity) found.push({ id, best, speaks: peaks === Infinity, at: i });
  });
  return found.sort((a, b) => a.best - b.best || latents.density[b.at] - latents.density[a.at]);
}

function searchBox() {
  const input = element("input", {
    type: "search", id: "search", placeholder: "Token or latent id  ( / )", autocomplete: "off",
    "aria-label": "Search latents by token or id", spellcheck: false,
  });
  const list = element("ul", { className: "results", hidden: true, "aria-label": "Found latents" });
  let chosen = -1;
  const choose = (next) => {
    const links = list.querySelectorAll("a");
    if (!links.length) return;
    chosen = (next + links.length) % links.length;
    links.forEach((link, i) => link.classList.toggle("chosen", i === chosen));
    links[chosen].scrollIntoView({ block: "nearest" });
  };
  const show = () => {
    const found = search(input.value);
    list.replaceChildren(...found.slice(0, 60).map(({ id, at, speaks }) => {
      const link = element("a", { href: `latent.html#${id}`, tabIndex: -1 }, `${id} `);
      const kind = speaks ? dashboard.overview.latents.promoted[at].map((t) => table()[t]) : peakTokens(at);
      if (speaks) link.append("promotes ");
      link.append(...kind.slice(0, 4).map(boxed));
      return element("li", {}, link);
    }));
    const count = found.length ? `${found.length} latents` : "No latent peaks on this or promotes it.";
    list.prepend(element("li", { className: "note", role: "status" }, count));
    list.hidden = !input.value.trim();
    chosen = -1;
    if (found.length) choose(0);
  };
  input.addEventListener("input", show);
  input.addEventListener("focus", show);
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") choose(chosen + 1);
    else if (event.key === "ArrowUp") choose(chosen - 1);
    else if (event.key === "Enter") list.querySelectorAll("a")[chosen]?.click();
    else if (event.key === "Escape") { input.value = ""; input.blur(); list.hidden = true; }
    else return;
    event.preventDefault();
  });
  list.addEventListener("click", () => { list.hidden = true; input.blur(); });
  document.addEventListener("click", (event) => {
    if (!event.target.closest(".search")) list.hidden = true;
  });
  return element("div", { className: "search", role: "search" }, input, list);
}

// Draws the page. move: what the arrow keys left (-1) and right (1) do, if anything.
function page(draw, move = null) {
  if (!dashboard.overview) {
    document.querySelector("main").textContent = "data/overview.js is missing: make the dashboard again.";
    return;
  }
  const { about } = dashboard.overview;
  document.querySelector("header").append(
    element("a", { className: "home", href: "index.html" }, about.title),
    element("span", { className: "about" },
      `${about.latents} latents in ${about.experts} ${about.experts > 1 ? "experts" : "dictionary"}, ` +
      `block ${about.layer} of ${about.model}`),
    searchBox(),
  );
  const help = element("footer", {}, element("kbd", {}, "/"), " search");
  if (move) help.append("   ", element("kbd", {}, "←"), " ", element("kbd", {}, "→"), " previous, next");
  document.body.append(help);
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") document.getElementById("search").focus();
    else if (move && event.key === "ArrowLeft") move(-1);
    else if (move && event.key === "ArrowRight") move(1);
    else return;
    event.preventDefault();
  });
  draw();
  window.addEventListener("hashchange", () => {
    if (location.hash === "#main") return;
    draw();
    window.scrollTo(0, 0);
  });
}
