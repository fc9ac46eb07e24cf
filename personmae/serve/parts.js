// What the other scripts share: elements, requests, and messages.

export const find = (id) => document.getElementById(id);

// An element with properties, attributes in `attributes`, and children. Texts become text, never markup.
export function make(tag, { attributes = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const counted = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;

export function showProblem(text) {
  const place = find("problem");
  place.textContent = text;
  place.hidden = !text;
}

// Move to what has just come, its heading first. On a narrow page it begins at the top of the window.
export function reveal(section, title) {
  title.focus({ preventScroll: true });
  section.scrollIntoView({ block: innerWidth < 860 ? "start" : "nearest" });
}

// Do something with the problem line cleared, a button disabled, and an error shown.
export async function attempt(button, work) {
  showProblem("");
  if (button) button.disabled = true;
  try {
    return await work();
  } catch (error) {
    showProblem(sentence(error.message));
    return null;
  } finally {
    if (button) button.disabled = false;
  }
}

function sentence(text) {
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.?!]$/.test(text) ? "" : "."}`;
}

export async function get(path, query = {}) {
  return answerOf(fetch(`${path}?${new URLSearchParams(query)}`));
}

// Images go with each request, since the server keeps none.
export async function ask(path, request, files = []) {
  const form = new FormData();
  form.append("request", JSON.stringify(request));
  for (const file of files) form.append("image", file, "image");
  return answerOf(fetch(path, { method: "POST", body: form }));
}

async function answerOf(response) {
  let found;
  try {
    found = await response;
  } catch {
    throw new Error("the server does not answer: is it still running?");
  }
  const content = await found.json().catch(() => null);
  if (!found.ok) throw new Error(content?.error ?? `the server answered with ${found.status}`);
  return content;
}

// The picture of a row of the gallery, or words in its place.
export function picture(row, alt) {
  if (!row.has_thumbnail) return make("span", { className: "none", textContent: "no small copy is kept" });
  return make("img", { src: `/thumbnail/${row.key}`, alt, loading: "lazy", draggable: false });
}

// Files that are chosen or dropped.
export function takeFiles(input, zone, take) {
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = "";
  });
  for (const name of ["dragenter", "dragover"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      zone.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });
}

// Why a file is not taken, or nothing.
export function refusal(file) {
  const most = Number(document.body.dataset.mostBytes);
  if (file.size > most) return `an image of at most ${most / 1e6} MB is required: make it smaller`;
  if (!["", "image/jpeg", "image/png", "image/webp", "image/bmp", "image/x-ms-bmp"].includes(file.type)) {
    return "a JPEG, PNG, WebP or BMP image is required: save it as one";
  }
  return "";
}
