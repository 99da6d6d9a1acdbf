// The overview: sentences, density, map of decoder directions, experts.
"use strict";

function summary() {
  const { about, density } = dashboard.overview;
  return facts([
    ["architecture", about.architecture],
    ["latents", about.latents],
    ["experts", `${about.experts}, ${about.active} a token`],
    ["k", about.k],
    ["held-out tokens", about.tokens.toLocaleString("en")],
    ["text", about.text],
    ["never fired", percent(density.dead)],
  ]);
}

function densities() {
  const { density, density_edges: edges } = dashboard.overview.density;
  const first = Math.max(0, density.findIndex((count) => count > 0));
  const counts = density.slice(first), low = edges[first], span = edges.at(-1) - low;
  const whole = edges.filter((edge) => edge >= low && Number.isInteger(edge));
  const ticks = whole.map((edge) => [(edge - low) / span, edge ? `1e${edge}` : "1"]);
  const title = (i) => `${number(10 ** edges[first + i])} to ${number(10 ** edges[first + i + 1])}: ${counts[i]} latents`;
  return card("How often latents fire", "Latents by share of tokens on which they fire.",
    bars(counts, ticks, title, "Histogram of firing frequency"));
}

// Latents as points in the plane of their decoder directions, in the colour of their expert.
function map() {
  const { about, latents, plane_share: share } = dashboard.overview;
  const canvas = element("canvas", { role: "img", "aria-label": "Map of decoder directions; search and lists lead to the same pages" });
  const tip = element("div", { className: "tip", hidden: true });
  const at = (i) => [
    (0.5 + 0.48 * latents.x[i]) * canvas.clientWidth, (0.5 - 0.48 * latents.y[i]) * canvas.clientHeight,
  ];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const draw = () => {
    const scale = window.devicePixelRatio || 1, width = canvas.parentElement.clientWidth;
    canvas.style.height = `${Math.round(width * 0.62)}px`;
    [canvas.width, canvas.height] = [width * scale, Math.round(width * 0.62) * scale];
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    latents.id.forEach((id, i) => {
      const hue = about.experts > 1 ? (expertOf(id) * 360) / about.experts : 210;
      const alpha = latents.density[i] ? 0.75 : 0.2;
      pen.fillStyle = `hsl(${hue} 65% ${dark.matches ? 66 : 42}% / ${alpha})`;
      pen.beginPath();
      pen.arc(...at(i), 2.4, 0, 2 * Math.PI);
      pen.fill();
    });
  };
  const nearest = (event) => {
    let best = null, least = 14 ** 2;
    latents.id.forEach((_, i) => {
      const [x, y] = at(i), far = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
      if (far < least) [best, least] = [i, far];
    });
    return best;
  };
  canvas.addEventListener("pointermove", (event) => {
    const i = nearest(event);
    tip.hidden = i === null;
    if (i === null) return;
    tip.replaceChildren(`${latents.id[i]}, expert ${expertOf(latents.id[i])} `, ...peakTokens(i).slice(0, 3).map(boxed));
    const [x, y] = at(i);
    tip.style.left = `${Math.min(x, canvas.clientWidth * 0.6)}px`;
    tip.style.top = `${y + 12}px`;
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("click", (event) => {
    const i = nearest(event);
    if (i !== null) location.href = `latent.html#${latents.id[i]}`;
  });
  dark.addEventListener("change", draw);
  requestAnimationFrame(() => new ResizeObserver(draw).observe(canvas.parentElement));
  const note = `Two principal axes of the decoder directions (${percent(share)} of their variance). `
    + (about.experts > 1 ? "A colour an expert; " : "") + "faint: never fired. Click a point.";
  return card("Map of decoder cosines", note, element("div", { className: "map" }, canvas, tip));
}

function experts() {
  const { experts: all, about } = dashboard.overview;
  const most = Math.max(...all.map((expert) => expert.load));
  const rows = all.map((expert, i) => [
    expertLink(i),
    element("meter", { value: expert.load, max: most, title: percent(expert.load), "aria-label": `load of expert ${i}` }),
    percent(expert.load),
    `${expert.live} of ${about.size}`,
    element("span", {}, ...expert.tokens.slice(0, 10).map((token) => boxed(table()[token]))),
  ]);
  const note = "Tokens are those that the router sends to an expert more than to others.";
  const one = about.experts === 1;
  return card(one ? "The dictionary" : "Experts", one ? "" : note,
    grid(["", "load", "#", "#latents that fire", one ? "" : "tokens"], rows));
}

function sentence({ text, strings, kept, experts: routed, latents }) {
  const many = dashboard.overview.about.experts > 1;
  const rows = strings.map((token, i) => [
    boxed(token),
    ...(many ? [kept[i] ? element("span", {}, ...routed[i].flatMap((e) => [
      element("a", { href: `expert.html#${e}` }, String(e)), " "])) : ""] : []),
    kept[i]
      ? element("span", {}, ...latents[i].map(([id, value]) => {
        const link = latentLink(id);
        link.title = number(value);
        return link;
      }))
      : "not encoded",
  ]);
  const headings = ["token", ...(many ? ["experts"] : []), "latents, the strongest first"];
  return card("What fires on this sentence", text, grid(headings, rows));
}

page(() => {
  document.title = `${dashboard.overview.about.title} · dashboard`;
  document.querySelector("main").replaceChildren(
    element("h1", {}, "Overview"),
    summary(),
    element("div", { className: "grid halves" }, densities(), map()),
    element("div", { className: "grid" }, ...dashboard.sentences.map(sentence), experts()));
});
