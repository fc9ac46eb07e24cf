// The images of the person that is searched for: rows of the gallery, and uploads with a box on them.

import { find, make, picture, refusal, showProblem, takeFiles } from "./parts.js";

const chosen = []; // {row} of the gallery, or {file, url, box}
const listeners = [];
let edited = null;
const LARGEST = [276, 320]; // (width, height) of the image on which a box is drawn

export const onChange = (listener) => listeners.push(listener);
export const isChosen = (key) => chosen.some((query) => query.row?.key === key);
export const isEmpty = () => chosen.length === 0;

// What the server is asked, and the files that go along.
export function asked() {
  const files = chosen.filter((query) => query.file).map((query) => query.file);
  const images = chosen.map((query) => (query.row ? { key: query.row.key, id: query.row.id } : { upload: files.indexOf(query.file), box: query.box }));
  return { images, files };
}

export const first = () => ({ images: asked().images.slice(0, 1), files: asked().files.slice(0, 1) });

export function toggle(row) {
  const place = chosen.findIndex((query) => query.row?.key === row.key);
  if (place >= 0) chosen.splice(place, 1);
  else if (hasRoom()) chosen.push({ row });
  render();
}

function hasRoom() {
  const most = Number(document.body.dataset.mostImages);
  if (chosen.length < most) return true;
  showProblem(`At most ${most} images are taken as one person: remove one first.`);
  return false;
}

function addFiles(files) {
  showProblem("");
  for (const file of files) {
    const problem = refusal(file);
    if (problem) showProblem(`${problem.charAt(0).toUpperCase()}${problem.slice(1)}.`);
    else if (hasRoom()) chosen.push({ file, url: URL.createObjectURL(file), box: null });
  }
  render();
}

function remove(query) {
  chosen.splice(chosen.indexOf(query), 1);
  if (query.url) URL.revokeObjectURL(query.url);
  if (edited === query) closeEditor();
  render();
  find("search-file").focus();
}

function render() {
  find("chosen").replaceChildren(...chosen.map(item));
  for (const listener of listeners) listener();
}

function item(query, place) {
  const name = query.row ? query.row.id : `upload ${place + 1}`;
  const image = query.row ? picture(query.row, `Query ${name}`) : make("img", { src: query.url, alt: "Uploaded image" });
  image.addEventListener("error", () => query.file && unreadable(query));
  const frame = make("div", { className: "frame" }, image);
  const removal = make("button", { type: "button", textContent: "Remove", attributes: { "aria-label": `Remove ${name}` } });
  removal.addEventListener("click", () => remove(query));
  return make("li", {}, frame, query.file ? boxButton(query, name) : null, removal);
}

function boxButton(query, name) {
  const label = query.box ? "Box set" : "Draw a box";
  const button = make("button", { type: "button", textContent: label, attributes: { "aria-label": `${label} on ${name}` } });
  button.addEventListener("click", () => openEditor(query));
  return button;
}

function unreadable(query) {
  if (!chosen.includes(query)) return;
  remove(query);
  showProblem("This file is no image that can be shown. A JPEG, PNG, WebP or BMP image is required.");
}

// --- the box ---

const sides = ["left", "top", "right", "bottom"];
const field = (side) => find(`box-${side}`);

async function openEditor(query) {
  edited = query;
  const image = find("box-image");
  image.src = query.url;
  await image.decode();
  find("box-stage").style.width = `${Math.min(LARGEST[0], (LARGEST[1] * image.naturalWidth) / image.naturalHeight)}px`;
  find("box-editor").hidden = false;
  showBox();
  field("left").focus();
}

function closeEditor() {
  edited = null;
  find("box-editor").hidden = true;
  render();
}

function setBox(box) {
  const isUsable = box && box.right - box.left > 0.01 && box.bottom - box.top > 0.01;
  edited.box = isUsable ? box : null;
}

function showBox() {
  const box = edited.box ?? { left: 0, top: 0, right: 1, bottom: 1 };
  for (const side of sides) field(side).value = Math.round(100 * box[side]);
  drawBox(edited.box);
}

function drawBox(box) {
  const drawn = find("box-drawn");
  drawn.hidden = !box;
  if (!box) return;
  drawn.style.left = `${100 * box.left}%`;
  drawn.style.top = `${100 * box.top}%`;
  drawn.style.width = `${100 * (box.right - box.left)}%`;
  drawn.style.height = `${100 * (box.bottom - box.top)}%`;
}

function typed() {
  const [left, top, right, bottom] = sides.map((side) => Math.min(1, Math.max(0, field(side).valueAsNumber / 100)));
  if ([left, top, right, bottom].some(Number.isNaN)) return;
  const isWhole = left === 0 && top === 0 && right === 1 && bottom === 1;
  setBox(isWhole ? null : { left, top, right, bottom });
  drawBox(edited.box);
}

function drag(stage, start) {
  const at = (event) => {
    const { left, top, width, height } = stage.getBoundingClientRect();
    const inside = (share) => Math.min(1, Math.max(0, share));
    return [inside((event.clientX - left) / width), inside((event.clientY - top) / height)];
  };
  const [x, y] = at(start);
  const move = (event) => {
    const [toX, toY] = at(event);
    setBox({ left: Math.min(x, toX), top: Math.min(y, toY), right: Math.max(x, toX), bottom: Math.max(y, toY) });
    showBox();
  };
  const end = () => {
    stage.removeEventListener("pointermove", move);
    render();
  };
  stage.setPointerCapture(start.pointerId);
  stage.addEventListener("pointermove", move);
  stage.addEventListener("pointerup", end, { once: true });
  stage.addEventListener("pointercancel", end, { once: true });
}

export function start() {
  takeFiles(find("search-file"), find("search-drop"), addFiles);
  find("box-stage").addEventListener("pointerdown", (event) => {
    event.preventDefault();
    drag(find("box-stage"), event);
  });
  for (const side of sides) field(side).addEventListener("input", typed);
  find("box-whole").addEventListener("click", () => {
    setBox(null);
    showBox();
  });
  find("box-done").addEventListener("click", () => {
    closeEditor();
    find("search-button").focus();
  });
}
