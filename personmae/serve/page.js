// The page: its tabs, and what is there at present.

import { browse } from "./browse.js";
import * as comparison from "./compare.js";
import { attempt, counted, find, get, showProblem } from "./parts.js";
import * as queries from "./queries.js";
import * as reconstruction from "./reconstruct.js";
import * as search from "./search.js";

const AGAIN = 1500; // milliseconds until a model that is loaded is asked for again
const ENCODER = { loading: "model for uploads: loading", ready: "model for uploads: ready", failed: "no model for uploads", absent: "no model for uploads" };
let isFirst = true;

async function refresh(gallery) {
  const state = await attempt(null, () => get("/api/state"));
  if (!state) return;
  find("num-images").textContent = state.num_images.toLocaleString("en");
  find("num-cameras").hidden = !state.cameras.length;
  find("num-cameras").textContent = counted(state.cameras.length, "camera");
  find("encoder-tag").hidden = false;
  find("encoder-state").textContent = ENCODER[state.encoder];
  find("encoder-tag").className = state.encoder === "ready" ? "" : "warn";
  if (isFirst) {
    isFirst = false;
    search.setFilters(state);
    gallery.setCameras(state.cameras);
  }
  if (state.grid) reconstruction.setGrid(state.grid, state.size);
  if (state.encoder === "loading" || state.pretrained === "loading") setTimeout(() => refresh(gallery), AGAIN);
}

function choose(chosen) {
  showProblem("");
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isOn = tab === chosen;
    tab.setAttribute("aria-selected", String(isOn));
    tab.tabIndex = isOn ? 0 : -1;
    find(tab.getAttribute("aria-controls")).hidden = !isOn;
  }
}

function startTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  for (const [place, tab] of tabs.entries()) {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const to = tabs[(place + step + tabs.length) % tabs.length];
      choose(to);
      to.focus();
    });
  }
}

queries.start();
search.start();
comparison.start();
startTabs();
const gallery = browse(find("browse-search"), queries.toggle, queries.isChosen);
queries.onChange(gallery.mark);
if (find("panel-reconstruct")) reconstruction.start();
refresh(gallery);
