// Pages of the gallery, by camera and by a part of an id.

import { attempt, counted, get, make, picture } from "./parts.js";

const PAGE = 48;
const PAUSE = 250; // milliseconds after the last letter that is typed

// A browser in `place`. `pick` is called with the row that is clicked, `isPicked` says whether one is.
export function browse(place, pick, isPicked) {
  const id = place.id;
  const part = make("input", { type: "search", id: `${id}-part`, size: 12, autocomplete: "off" });
  const camera = make("select", { id: `${id}-camera` }, make("option", { value: "", textContent: "all" }));
  const cameras = make("label", { hidden: true }, "camera ", camera);
  const back = make("button", { type: "button", textContent: "‹", attributes: { "aria-label": "Page before" } });
  const on = make("button", { type: "button", textContent: "›", attributes: { "aria-label": "Next page" } });
  const where = make("span", { attributes: { role: "status" } });
  const list = make("ul", { className: "rows", attributes: { "aria-label": "Images of the gallery" } });
  const pages = make("span", { className: "pages" }, back, where, on);
  place.append(make("div", { className: "toolbar" }, make("label", {}, "id ", part), cameras, pages), list);
  let page = 0;
  let asking = 0;

  async function show(to) {
    const mine = ++asking;
    const answer = await attempt(null, () => get("/api/rows", { page: to, camera: camera.value, part: part.value }));
    if (!answer || mine !== asking) return;
    if (!answer.rows.length && to > 0) return show(0);
    page = to;
    list.replaceChildren(...answer.rows.map(tile));
    const last = Math.max(1, Math.ceil(answer.total / PAGE));
    where.textContent = answer.total ? `${page + 1} of ${last}, ${counted(answer.total, "image")}` : "no image";
    back.disabled = page === 0;
    on.disabled = page + 1 >= last;
  }

  function tile(row) {
    const words = row.camera ? `${row.id}, camera ${row.camera}` : row.id;
    const button = make("button", { type: "button", className: "picture", title: row.id }, picture(row, words));
    button.dataset.key = row.key;
    if (!row.has_thumbnail) button.setAttribute("aria-label", words);
    button.addEventListener("click", () => pick(row));
    mark(button);
    return make("li", {}, button);
  }

  const mark = (button) => button.setAttribute("aria-pressed", String(isPicked(Number(button.dataset.key))));
  let timer = 0;
  part.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => show(0), PAUSE);
  });
  camera.addEventListener("change", () => show(0));
  back.addEventListener("click", () => show(page - 1));
  on.addEventListener("click", () => show(page + 1));
  show(0);
  return {
    mark: () => list.querySelectorAll(".picture").forEach(mark),
    setCameras(names) {
      cameras.hidden = names.length < 2;
      camera.append(...names.map((name) => make("option", { value: name, textContent: name })));
    },
  };
}
