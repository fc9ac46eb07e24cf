// Two images next to each other, with lines between the patches that match.

import { ask, attempt, find, make } from "./parts.js";
import * as queries from "./queries.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 420;
const GAP = 120;
const NARROW = 600; // pixels of a window
const COPIES = "The gallery keeps small copies of its images. These were compared, so fine patterns may be lost.";

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function sized(src) {
  const image = make("img", { src });
  await image.decode();
  return { src, width: (HEIGHT * image.naturalWidth) / image.naturalHeight };
}

// Of several images of a query the first one is compared.
export async function compare(found, opener) {
  const { images, files } = queries.first();
  const answer = await attempt(opener, async () => {
    if (!images.length) throw new Error("an image of the person is required: choose one");
    const reply = await ask("/api/compare", { query: images[0].upload === undefined ? images[0] : { ...images[0], upload: 0 }, key: found.key, id: found.id }, files);
    return { ...reply, pair: await Promise.all([sized(reply.first), sized(reply.second)]) };
  });
  if (!answer) return;
  show(answer, found);
  find("comparison").showModal();
}

function show({ pair, matches, words }, found) {
  const [left, right] = pair;
  const shift = left.width + GAP;
  const svg = draw("svg", { viewBox: `0 0 ${shift + right.width} ${HEIGHT}`, role: "img", "aria-labelledby": "comparison-title", "aria-describedby": "comparison-words" });
  svg.append(draw("image", { href: left.src, width: left.width, height: HEIGHT }), draw("image", { href: right.src, x: shift, width: right.width, height: HEIGHT }));
  const places = matches.map((match) => ({
    from: [match.first[0] * left.width, match.first[1] * HEIGHT],
    to: [shift + match.second[0] * right.width, match.second[1] * HEIGHT],
  }));
  const lines = places.map((place, number) => line(place, matches[number].colour));
  const dots = places.map((place, number) => dotsOf(place, number + 1, matches[number].colour));
  svg.append(...lines.toReversed(), ...dots.toReversed()); // the best on top, and no line over a number
  const drawn = matches.map((_, number) => [lines[number], dots[number]]);
  find("pair").replaceChildren(svg);
  find("matches").replaceChildren(...matches.map((match, number) => chip(match, number, drawn)));
  find("comparison-words").textContent = words;
  const nothing = matches.length ? "" : "No two patches are each other's nearest. ";
  const query = queries.asked().images.length > 1 ? "the first image of the query" : "the query";
  const id = make("bdi", { textContent: found.id }); // it may turn the direction of what follows
  find("comparison-note").replaceChildren(`${nothing}On the left ${query}, on the right `, id, `. ${COPIES}`);
}

function line({ from, to }, colour) {
  const ends = { x1: from[0], y1: from[1], x2: to[0], y2: to[1] };
  const edge = draw("line", { ...ends, stroke: "#fff", "stroke-width": 4 });
  return draw("g", { class: "match" }, edge, draw("line", { ...ends, stroke: colour, "stroke-width": 2 }));
}

// Numbers stay readable where the page is narrow and the drawing is shrunk.
function dotsOf({ from, to }, number, colour) {
  const radius = innerWidth < NARROW ? 18 : 11;
  const group = draw("g", { class: "match" });
  for (const [x, y] of [from, to]) {
    group.append(
      draw("circle", { cx: x, cy: y, r: radius, fill: colour, stroke: "#fff", "stroke-width": 1.5 }),
      draw("text", { x, y: y + 0.37 * radius, fill: "#fff", "text-anchor": "middle", "font-size": 1.1 * radius }, String(number)),
    );
  }
  return group;
}

function chip(match, place, drawn) {
  const dot = make("span", { className: "dot", textContent: place + 1 });
  dot.style.background = match.colour;
  const button = make("button", { type: "button" }, dot, match.similarity.toFixed(2));
  button.setAttribute("aria-label", `Match ${place + 1}, similarity ${match.similarity.toFixed(2)}`);
  const only = (chosen) => drawn.forEach((pair, number) => pair.forEach((group) => group.classList.toggle("dimmed", chosen !== null && number !== chosen)));
  for (const name of ["pointerenter", "focus"]) button.addEventListener(name, () => only(place));
  for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => only(null));
  return make("li", {}, button);
}

export function start() {
  find("comparison-close").addEventListener("click", () => find("comparison").close());
}
