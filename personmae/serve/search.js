// The search: its options, and what was found.

import { compare } from "./compare.js";
import { ask, attempt, counted, find, make, picture, reveal } from "./parts.js";
import * as queries from "./queries.js";

function options() {
  const number = (id) => (find(id).value ? find(id).valueAsNumber : null);
  return {
    top: number("top") ?? 20,
    rerank: number("rerank"),
    cameras: [...document.querySelectorAll("#camera-boxes :checked")].map((box) => box.value),
    other_cameras: find("other-cameras").checked,
    since: find("since").value,
    until: find("until").value,
  };
}

async function search(event) {
  event.preventDefault();
  const { images, files } = queries.asked();
  find("hits").classList.add("busy");
  const answer = await attempt(find("search-button"), () => ask("/api/search", { images, ...options() }, files));
  find("hits").classList.remove("busy");
  find("search-button").disabled = queries.isEmpty();
  if (answer) show(answer);
}

function show({ hits, how, num_images: total }) {
  find("results").hidden = false;
  find("results-note").textContent = hits.length
    ? `${counted(hits.length, "image")} of ${total.toLocaleString("en")}, the most similar first. Search: ${how}.`
    : "Nothing was found. Ask for more cameras, or for another time.";
  find("hits").replaceChildren(...hits.map(hit));
  reveal(find("results"), find("results-title"));
}

function hit(found) {
  const rank = make("span", { className: "rank", textContent: found.rank, attributes: { "aria-hidden": "true" } });
  const look = make("button", { type: "button", className: "picture" }, picture(found, ""), rank);
  look.setAttribute("aria-label", `Rank ${found.rank}, ${found.id}: compare with the query`);
  look.addEventListener("click", () => compare(found, look));
  const meter = make("meter", { className: "score", min: 0, max: 1, value: Math.max(0, found.score) });
  meter.setAttribute("aria-label", `Similarity of rank ${found.rank}`);
  const where = [found.camera && `camera ${found.camera}`, found.time.replace("T", " ").replace("Z", "")].filter(Boolean);
  const about = make(
    "div",
    { className: "about" },
    make("strong", { textContent: found.score.toFixed(3) }),
    meter,
    ...where.map((textContent) => make("span", { textContent })),
    make("span", { className: "id", title: found.id }, make("bdi", { textContent: found.id })),
  );
  const add = make("button", { type: "button", textContent: queries.isChosen(found.key) ? "Remove" : "Add to query" });
  add.setAttribute("aria-label", `${add.textContent}: ${found.id}`);
  add.addEventListener("click", () => {
    queries.toggle(found);
    add.textContent = queries.isChosen(found.key) ? "Remove" : "Add to query";
    add.setAttribute("aria-label", `${add.textContent}: ${found.id}`);
  });
  return make("li", {}, look, about, make("div", { className: "actions" }, add));
}

export function start() {
  find("search-form").addEventListener("submit", search);
  const enable = () => (find("search-button").disabled = queries.isEmpty());
  queries.onChange(enable);
  enable();
}

// What the gallery has is what can be asked for.
export function setFilters({ cameras, times }) {
  find("cameras").hidden = cameras.length < 2;
  find("camera-boxes").replaceChildren(
    ...cameras.map((name) => make("label", {}, make("input", { type: "checkbox", value: name }), name)),
  );
  find("times").hidden = !times.length;
  if (times.length) {
    find("since").placeholder = times[0];
    find("until").placeholder = times[1];
  }
}
