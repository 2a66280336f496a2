"use strict";
// Names and captions come with the data: everything is set as text, nothing as markup.

const TYPES = { image: "image/*", video: "video/*", audio: "audio/*" };
let conversation = null;

function element(name, content, attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...[content].flat().filter((part) => part !== null));
  return made;
}

function say(section, text, isError = false) {
  const status = section.querySelector(".status");
  status.textContent = text;
  status.classList.toggle("error", isError);
}

function addFiles(section, modalities, several) {
  const fieldset = section.querySelector(".files");
  for (const name of modalities) {
    const input = element("input", null, { type: "file", name, ...(TYPES[name] ? { accept: TYPES[name] } : {}) });
    input.multiple = several;
    fieldset.append(element("label", [name[0].toUpperCase() + name.slice(1), input]));
  }
  fieldset.hidden = modalities.length === 0;
}

function addOptions(select, values) {
  select.append(...values.map((value) => element("option", value, { value })));
}

// What is filled in: empty fields and files are left out.
function fields(form) {
  const data = new FormData();
  for (const [name, value] of new FormData(form)) {
    if (name === "label") value.split("\n").map((x) => x.trim()).filter(Boolean).forEach((x) => data.append(name, x));
    else if (value instanceof File ? value.name !== "" : value !== "") data.append(name, value);
  }
  return data;
}

async function post(route, body, signal) {
  const answer = await fetch(route, { method: "POST", body, signal });
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({ error: `${answer.status} ${answer.statusText}` }));
    throw new Error(problem.error);
  }
  return answer;
}

function player(hit) {
  if (hit.thumbnail) {
    const image = element("img", null, { src: hit.thumbnail, alt: hit.text || hit.id, loading: "lazy" });
    return hit.media ? element("a", image, { href: hit.media, target: "_blank" }) : image;
  }
  if (hit.media && (hit.kind === "audio" || hit.kind === "video")) {
    return element(hit.kind, null, { src: hit.media, controls: "", preload: "metadata", "aria-label": hit.id });
  }
  return hit.media ? element("a", "Open", { href: hit.media, target: "_blank" }) : null;
}

function showHits(section, { among, hits }) {
  const items = hits.map((hit) => element("li", [
    player(hit),
    element("div", [element("span", hit.score.toFixed(3), { class: "score" }), hit.id.split("/").pop()], { title: hit.id }),
    hit.text ? element("div", hit.text) : null,
  ]));
  section.querySelector(".hits").replaceChildren(...items);
  say(section, `${hits.length} hits of ${among}, the nearest first.`);
}

function showClasses(section, { classes }) {
  const rows = classes.map(({ label, probability }) => element("tr", [
    element("th", label, { scope: "row" }), element("td", `${(100 * probability).toFixed(1)} %`),
  ]));
  section.querySelector("tbody").replaceChildren(...rows);
  section.querySelector("table").hidden = false;
  say(section, `Most probable: ${classes[0].label}.`);
}

async function* linesOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts.map((part) => JSON.parse(part));
  }
}

async function showAnswer(section, answer) {
  const shown = element("p", "", { class: "answer", "aria-busy": "true" }); // read out when it is whole
  const log = section.querySelector(".log");
  log.append(shown);
  for await (const line of linesOf(answer)) {
    if (line.conversation !== undefined) conversation = line.conversation;
    if (line.piece !== undefined) shown.textContent += line.piece;
    if (line.answer !== undefined) shown.textContent = line.answer;
    if (line.error !== undefined) throw new Error(line.error);
    log.scrollTop = log.scrollHeight;
  }
  shown.removeAttribute("aria-busy");
  say(section, "");
}

const SHOWN = { "/search": showHits, "/classify": showClasses };

function listen(section) {
  const form = section.querySelector("form");
  const stop = section.querySelector(".stop");
  let running = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const route = form.dataset.route;
    const body = fields(form);
    if (running && route === "/chat") return say(section, "The answer is still being generated.", true);
    if (running) running.abort();
    const own = running = new AbortController();
    say(section, "Computing");
    if (stop) stop.disabled = false;
    try {
      if (route === "/chat") {
        if (conversation) body.append("conversation", conversation);
        section.querySelector(".log").append(element("p", body.get("question"), { class: "question" }));
        const answer = await post(route, body, own.signal);
        form.querySelectorAll("[name=question], [type=file]").forEach((input) => { input.value = ""; });
        await showAnswer(section, answer);
      } else {
        SHOWN[route](section, await (await post(route, body, own.signal)).json());
      }
    } catch (error) {
      if (error.name !== "AbortError") say(section, error.message, true);
      else if (running === own) say(section, "Stopped.");
    } finally {
      if (running === own) {
        running = null;
        if (stop) stop.disabled = true;
      }
    }
  });
  form.addEventListener("reset", () => {
    if (running) running.abort();
    say(section, "");
    section.querySelector(".hits, tbody, .log").replaceChildren();
    if (section.id === "classify") section.querySelector("table").hidden = true;
    if (section.id === "chat") conversation = null;
  });
  if (stop) stop.addEventListener("click", () => running && running.abort());
  section.hidden = false;
}

async function begin() {
  const about = await (await fetch("/about")).json();
  const files = about.modalities.filter((name) => name !== "text");
  const [search, classify, chat] = ["search", "classify", "chat"].map((id) => document.getElementById(id));
  const indexed = Object.keys(about.indexed);
  document.title = `${about.name} - hfvlm`;
  const parts = [about.model, about.chat_model].filter(Boolean);
  const counts = indexed.map((name) => `${about.indexed[name]} of ${name}`);
  document.getElementById("about").textContent =
    `${about.name}, by ${parts.join(" and ")}${counts.length ? `: vectors ${counts.join(", ")}` : ""}`;
  if (indexed.length) {
    addFiles(search, files, true);
    addOptions(search.querySelector("[name=among]"), indexed);
    if (about.indexed.image) search.querySelector("[name=among]").value = "image";
    search.querySelector("[name=text]").closest("label").hidden = !about.modalities.includes("text");
    listen(search);
  }
  if (about.modalities.includes("text") && files.length) {
    addFiles(classify, files, false);
    addOptions(classify.querySelector("[name=templates]"), about.templates);
    classify.querySelector("[name=templates]").value = "single";
    listen(classify);
  }
  if (about.chat_model) {
    addFiles(chat, [about.chat_modality], true);
    listen(chat);
  }
}

begin().catch((error) => { document.getElementById("about").textContent = `The server does not answer: ${error.message}`; });
