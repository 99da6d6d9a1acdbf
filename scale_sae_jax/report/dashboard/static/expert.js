// The page of one expert: expert.html#NUMBER.
"use strict";

const AT_A_TIME = 200;

function step(by) {
  const { experts } = dashboard.overview.about;
  location.hash = (Number(location.hash.slice(1)) + by + experts) % experts;
}

page(() => {
  const expert = Number(location.hash.slice(1)), { about, latents, experts } = dashboard.overview;
  const main = document.querySelector("main"), profile = experts[expert];
  document.title = `Expert ${expert} · ${about.title}`;
  if (!profile) {
    main.replaceChildren(element("h1", {}, "No such expert"));
    return;
  }
  const mine = latents.id.map((id, i) => i).filter((i) => expertOf(latents.id[i]) === expert)
    .sort((a, b) => latents.density[b] - latents.density[a]);
  const row = (i) => [
    latentLink(latents.id[i]),
    percent(latents.density[i]),
    number(latents.largest[i]),
    element("span", {}, ...peakTokens(i).map(boxed)),
    element("span", {}, ...latents.promoted[i].map((token) => boxed(table()[token]))),
  ];
  const list = grid(["latent", "#fires on", "#largest", "peaks on", "promotes"],
    mine.slice(0, AT_A_TIME).map(row));
  const more = element("button", { type: "button", hidden: mine.length <= AT_A_TIME }, "Show all");
  more.addEventListener("click", () => {
    const rest = grid(["", "#", "#", "", ""], mine.slice(AT_A_TIME).map(row));
    list.querySelector("tbody").append(...rest.querySelectorAll("tbody tr"));
    more.remove();
  });
  const tokens = grid(["token", "#of its tokens", "#times the usual"], profile.tokens.map((token, i) =>
    [boxed(table()[token]), percent(profile.shares[i]), number(profile.lifts[i])]));
  main.replaceChildren(
    element("h1", {}, `Expert ${expert}`),
    facts([
      ["share of routing", percent(profile.load)],
      ["latents that fire", `${profile.live} of ${about.size}`],
    ]),
    element("div", { className: "moves" },
      element("a", { href: `#${(expert + about.experts - 1) % about.experts}` }, "← previous"),
      element("a", { href: `#${(expert + 1) % about.experts}` }, "next →")),
    element("div", { className: "grid wide" },
      card("Latents", "Those that fire most often first.", list, more),
      card("Tokens", "That the router sends here more than elsewhere.", tokens)));
}, step);
