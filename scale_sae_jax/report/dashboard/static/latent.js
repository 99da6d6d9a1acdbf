// The page of one latent: latent.html#ID.
"use strict";

function current() {
  return Number(location.hash.slice(1));
}

function step(by) {
  const { id } = dashboard.overview.latents, at = place(current());
  location.hash = id[at === undefined ? 0 : (at + by + id.length) % id.length];
}

// Calls `then` with a latent's record, once its file is there.
function load(id, then) {
  const shard = Math.floor(id / dashboard.overview.shard);
  if (dashboard.shards[shard]) {
    then(dashboard.shards[shard][id]);
    return;
  }
  const script = element("script", { src: `data/latents-${shard}.js` });
  script.onload = () => then(dashboard.shards[shard]?.[id]);
  script.onerror = () => then(null);
  document.head.append(script);
}

function histogram(record) {
  const used = record.histogram.findLastIndex((count) => count > 0) + 1;
  const width = record.edge / record.histogram.length, counts = record.histogram.slice(0, used);
  const ticks = [0, 0.5, 1].map((share) => [share, number(share * used * width)]);
  const title = (i) => `${number(i * width)} to ${number((i + 1) * width)}: ${counts[i]} tokens`;
  return bars(counts, ticks, title, `Histogram of ${record.firing} activations`);
}

function words([tokens, values]) {
  return grid(["token", "#logit"], tokens.map((token, i) => [boxed(table()[token]), number(values[i])]));
}

function neighbours([ids, cosines], across) {
  if (!ids.length) return element("p", { className: "note" }, "None.");
  const rows = ids.map((id, i) => {
    const row = [latentLink(id), number(cosines[i])];
    return across ? [row[0], expertLink(expertOf(id)), row[1]] : row;
  });
  return grid(across ? ["latent", "expert", "#cosine"] : ["latent", "#cosine"], rows);
}

function show(id, record) {
  const { about, latents } = dashboard.overview, at = place(id);
  const most = latents.largest[at];
  const shaded = (windows) => windows.map((window) => context(window, most));
  const where = about.experts > 1
    ? [["of", expertLink(expertOf(id))], ["number in it", String(id % about.size)]] : [];
  const head = [
    element("h1", {}, `Latent ${id}`),
    facts([
      ...where,
      ["fires on", `${percent(latents.density[at])} of tokens (${record.firing})`],
      ["in", `${record.pieces} pieces of text`],
      ["largest", number(most)],
    ]),
    element("div", { className: "moves" },
      element("a", { href: `#${latents.id.at(at - 1)}` }, "← previous"),
      element("a", { href: `#${latents.id[(at + 1) % latents.id.length]}` }, "next →")),
  ];
  const texts = card("Contexts", record.top.length
    ? "Each is one piece of text, around its largest activation (underlined)." : "",
    ...(record.top.length
      ? [element("h3", {}, "Largest"), ...shaded(record.top)]
      : [element("p", { className: "note" }, `It never fired on ${about.tokens} tokens.`)]),
    ...record.bands.flatMap((band) => [
      element("h3", {}, `Sampled, ${band.name}: ${number(band.low)} to ${number(band.high)}`),
      ...shaded(band.contexts),
    ]));
  const side = element("div", {},
    ...(record.top.length ? [card("Activations", "", histogram(record))] : []),
    card("Next tokens", "Its direction through the unembedding.", element("div", { className: "pair" },
      element("div", {}, element("h3", {}, "Promoted"), words(record.promoted)),
      element("div", {}, element("h3", {}, "Suppressed"), words(record.suppressed)))),
    card(about.experts > 1 ? "Nearest in its expert" : "Nearest", "By decoder cosine.",
      neighbours(record.intra, false)),
    ...(about.experts > 1
      ? [card("Nearest in other experts", "A cosine near 1 is a duplicate.", neighbours(record.inter, true))]
      : []));
  document.querySelector("main").replaceChildren(
    ...head, element("div", { className: "grid wide" }, texts, side));
}

page(() => {
  const id = current(), main = document.querySelector("main");
  document.title = `Latent ${id} · ${dashboard.overview.about.title}`;
  if (place(id) === undefined) {
    main.replaceChildren(element("h1", {}, "No such latent"),
      element("p", { className: "note" }, "This dashboard has no page of it. Search for another one."));
    return;
  }
  load(id, (record) => {
    if (id !== current()) return;  // another page was asked for meanwhile
    if (record) show(id, record);
    else main.textContent = "Its file is missing: make the dashboard again.";
  });
}, step);
