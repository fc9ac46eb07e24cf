// Figure 3 of the paper for one image, with a mask that the visitor draws.

import { browse } from "./browse.js";
import { ask, attempt, find, make, refusal, reveal, showProblem, takeFiles } from "./parts.js";

const SHARE = 0.75; // hidden by "random blocks", as in pre-training
const PARTS = [
  ["region_a", "RegionA"],
  ["masked", "What the encoder sees"],
  ["prediction", "Prediction of RegionB"],
  ["region_b", "RegionB, the target"],
];
let image = null; // {row} or {file, url}
let shape = null; // [rows, columns]
let hidden = []; // row by row
let cells = [];
let gallery = null;

// Once the model is there its patches are known.
export function setGrid(grid, [height, width]) {
  if (shape) return;
  shape = grid;
  const place = find("patches");
  place.hidden = false;
  place.style.aspectRatio = `${width} / ${height}`;
  place.style.gridTemplateColumns = `repeat(${grid[1]}, 1fr)`;
  place.style.gridTemplateRows = `repeat(${grid[0]}, 1fr)`;
  hidden = new Array(grid[0] * grid[1]).fill(false);
  cells = hidden.map((_, number) => make("div", { tabIndex: number ? -1 : 0, attributes: { role: "gridcell", "data-cell": number } }));
  for (let row = 0; row < grid[0]; row++) {
    place.append(make("div", { attributes: { role: "row" } }, ...cells.slice(row * grid[1], (row + 1) * grid[1])));
  }
  drawBlocks();
}

function render() {
  cells.forEach((cell, number) => {
    const [row, column] = [Math.floor(number / shape[1]) + 1, (number % shape[1]) + 1];
    cell.setAttribute("aria-selected", String(hidden[number]));
    cell.setAttribute("aria-label", `row ${row}, column ${column}, ${hidden[number] ? "hidden" : "visible"}`);
  });
  const count = hidden.filter(Boolean).length;
  find("mask-count").textContent = `${count} of ${hidden.length} patches hidden`;
  find("predict").disabled = !image || count === 0 || count === hidden.length;
}

function setHidden(number, value) {
  hidden[number] = value;
  render();
}

// Rectangles until enough is hidden, and single patches for the rest.
function drawBlocks() {
  const target = Math.round(SHARE * hidden.length);
  const below = (most) => Math.floor(Math.random() * most);
  hidden.fill(false);
  for (let tries = 0; tries < 60; tries++) {
    const [height, width] = [1 + below(Math.ceil(shape[0] / 2)), 1 + below(Math.ceil(shape[1] / 2))];
    const [top, left] = [below(shape[0] - height + 1), below(shape[1] - width + 1)];
    const block = hidden.map((was, number) => was || (inside(number, 0, top, height) && inside(number, 1, left, width)));
    if (block.filter(Boolean).length <= target) hidden = block;
  }
  const open = hidden.flatMap((was, number) => (was ? [] : [number])).sort(() => Math.random() - 0.5);
  for (const number of open.slice(0, target - hidden.filter(Boolean).length)) hidden[number] = true;
  render();
}

function inside(number, axis, start, length) {
  const at = axis ? number % shape[1] : Math.floor(number / shape[1]);
  return at >= start && at < start + length;
}

// --- drawing ---

function paint(start) {
  const first = cellAt(start);
  if (first === null) return;
  start.preventDefault();
  const value = !hidden[first];
  const place = find("patches");
  const move = (event) => {
    const number = cellAt(event);
    if (number !== null && hidden[number] !== value) setHidden(number, value);
  };
  const end = () => place.removeEventListener("pointermove", move);
  place.setPointerCapture(start.pointerId);
  place.addEventListener("pointermove", move);
  place.addEventListener("pointerup", end, { once: true });
  place.addEventListener("pointercancel", end, { once: true });
  setHidden(first, value);
}

function cellAt(event) {
  const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-cell]");
  return cell ? Number(cell.dataset.cell) : null;
}

function press(event) {
  const at = cells.indexOf(document.activeElement);
  if (at < 0) return;
  const [rows, columns] = shape;
  const [row, column] = [Math.floor(at / columns), at % columns];
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -column], End: [0, columns - 1 - column] };
  if (event.key === " " || event.key === "Enter") setHidden(at, !hidden[at]);
  else if (event.key in steps) {
    const [down, right] = steps[event.key];
    const to = Math.min(rows - 1, Math.max(0, row + down)) * columns + Math.min(columns - 1, Math.max(0, column + right));
    cells[at].tabIndex = -1;
    cells[to].tabIndex = 0;
    cells[to].focus();
  } else return;
  event.preventDefault();
}

// --- the image ---

function setImage(chosen) {
  const isKept = chosen.file || chosen.row.has_thumbnail;
  showProblem(isKept ? "" : "The gallery keeps no small copy of that image. Choose a file in its place.");
  if (!isKept) return;
  if (image?.url) URL.revokeObjectURL(image.url);
  image = chosen;
  find("patches").querySelector("img")?.remove();
  find("patches").prepend(make("img", { src: image.url ?? `/thumbnail/${image.row.key}`, alt: "", draggable: false }));
  gallery.mark();
  if (shape) render();
  find("mask-title").scrollIntoView({ block: "nearest" });
}

function takeUpload([file]) {
  if (!file) return;
  const problem = refusal(file);
  showProblem(problem && `${problem.charAt(0).toUpperCase()}${problem.slice(1)}.`);
  if (!problem) setImage({ file, url: URL.createObjectURL(file) });
}

async function predict() {
  const [rows, columns] = shape;
  const mask = Array.from({ length: rows }, (_, row) => hidden.slice(row * columns, (row + 1) * columns));
  const wanted = image.row ? { key: image.row.key, id: image.row.id } : { upload: 0 };
  const answer = await attempt(find("predict"), () => ask("/api/reconstruct", { image: wanted, mask }, image.file ? [image.file] : []));
  if (answer) show(answer);
}

function show(answer) {
  find("figure").hidden = false;
  find("regions").replaceChildren(
    ...PARTS.map(([name, words]) => make("figure", {}, make("img", { src: answer[name], alt: words }), make("figcaption", { textContent: words }))),
  );
  find("figure-note").textContent = `${answer.words} RegionB is RegionA itself here: nothing is shifted.`;
  reveal(find("figure"), find("figure-title"));
}

export function start() {
  gallery = browse(find("browse-reconstruct"), (row) => setImage({ row }), (key) => image?.row?.key === key);
  takeFiles(find("reconstruct-file"), find("reconstruct-drop"), takeUpload);
  find("patches").addEventListener("pointerdown", paint);
  find("patches").addEventListener("keydown", press);
  find("mask-blocks").addEventListener("click", () => shape && drawBlocks());
  find("mask-clear").addEventListener("click", () => {
    hidden.fill(false);
    render();
  });
  find("predict").addEventListener("click", predict);
  find("predict").disabled = true;
  find("mask-count").textContent = "The model is being loaded ...";
}
