/** The page: image, regions and conversation. Text of people and models only ever becomes text nodes. */

import { call, keys, stream } from "./api.js";
import { Drawing } from "./drawing.js";
import { asCoco, asJson, download, keepImage, keptImage } from "./files.js";
import { colourOf, inkOf, nameOf, Regions, toApi } from "./regions.js";

/** @typedef {import("./files.js").Turn} Turn */
/** @typedef {import("./files.js").Item} Item */

/** An element of index.html. @type {(id: string) => any} */
const part = (id) => document.getElementById(id);
// Regions in a question or an answer, and their numbers.
const NUMBERS = /(<region|Region \[)(\d+)(?=[>\]])/gi;

/** The radio button that is chosen, which also knows what to say. @param {string} name */
const chosen = (name) => /** @type {HTMLInputElement} */ (document.querySelector(`input[name=${name}]:checked`));

/** @template {keyof HTMLElementTagNameMap} K @param {K} tag @param {string} look @param {(Node | string)[]} children */
function make(tag, look, ...children) {
  const element = document.createElement(tag);
  element.className = look;
  element.append(...children);
  return element;
}

/** @param {string} look @param {() => void} action @param {(Node | string)[]} children */
function makeButton(look, action, ...children) {
  const made = make("button", look, ...children);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

/** @type {HTMLImageElement} */
const picture = part("image");
/** @type {HTMLTextAreaElement} */
const text = part("text");
/** @type {HTMLElement} */
const log = part("log");
const [host, file, help, keyBox] = ["canvas", "file", "help-box", "key-box"].map(part);

/** @type {{blob: Blob | null, key: string, name: string, id: string, turns: Turn[]}} */
const state = { blob: null, key: "", name: "", id: "", turns: [] };
/** @type {AbortController | null} What stops the answer that is on its way. */
let running = null;

const regions = new Regions(
  () => {
    drawing.paint();
    paintRegions();
    save();
  },
  (number) => {
    const named = new RegExp(`<region${number}>|\\[${number}\\]`);
    return state.turns.some(({ mode, question, items }) => mode === "ask" && named.test(question + items[0]?.text));
  },
);
const drawing = new Drawing(host, regions, {
  pick: (number) => number && write(number),
  say,
  tool: setTool,
  change: paintSelected,
});

/** @param {string} sentence For a screen reader. */
function say(sentence) {
  part("said").textContent = sentence;
}

/** @param {unknown} error Shown until closed; nothing hides it. */
function notify(error) {
  part("notice").hidden = !error;
  part("notice-text").textContent = error instanceof Error ? error.message : `${error}`;
}

function save() {
  const whole = (/** @type {string} */ name, /** @type {unknown} */ value) => (name === "pending" ? undefined : value);
  const { key, name, turns } = state;
  sessionStorage.setItem("state", JSON.stringify({ key, name, turns, regions: regions.all }, whole));
}

/** Light a region up while the pointer or focus is on an element. @param {HTMLElement} element @param {number} number */
function lights(element, number) {
  for (const type of ["pointerenter", "focusin"]) element.addEventListener(type, () => drawing.light([number]));
  for (const type of ["pointerleave", "focusout"]) element.addEventListener(type, () => drawing.light([]));
  element.style.setProperty("--colour", colourOf(number));
  element.style.setProperty("--on-colour", inkOf(number));
}

/** Text with its regions as buttons that light them up. @param {string} words */
function withReferences(words) {
  /** @type {(Node | string)[]} */
  const pieces = [];
  let from = 0;
  for (const match of words.matchAll(/<region(\d+)>|Region \[(\d+)\]/gi)) {
    const number = Number(match[1] ?? match[2]);
    if (!regions.get(number)) continue;
    pieces.push(words.slice(from, match.index), reference(number, match[2] ? match[0] : ""));
    from = match.index + match[0].length;
  }
  return [...pieces, words.slice(from)];
}

/** @param {number} number @param {string} words */
function reference(number, words) {
  const show = () => {
    drawing.select(number);
    drawing.light([number]);
    host.scrollIntoView({ block: "nearest" });
  };
  const badge = make("span", "number", words ? "" : `${number}`);
  const made = makeButton(words ? "reference" : "reference bare", show, badge, words);
  made.setAttribute("aria-label", words || `Region ${number}`);
  lights(made, number);
  return made;
}

// The image ----------------------------------------------------------------------------------------------------------

/** @param {Blob} blob @param {string} name @param {Turn[]} turns */
async function open(blob, name, turns = []) {
  const url = URL.createObjectURL(blob);
  const trial = new Image();
  trial.src = url;
  const failed = await trial.decode().catch(() => true);
  if (failed) return notify(`${name}: this browser cannot show it as an image; try a JPEG or PNG file`);
  running?.abort();
  URL.revokeObjectURL(picture.src);
  picture.src = url;
  picture.alt = name;
  await picture.decode();
  Object.assign(state, { blob, name, id: "", turns, key: await keepImage(blob, state.key).catch(() => "") });
  part("main").removeAttribute("data-empty");
  part("frame").style.setProperty("--ratio", `${picture.naturalWidth / picture.naturalHeight}`);
  notify("");
  regions.reset([]);
  paintLog();
  resize();
  host.focus();
}

function resize() {
  const size = { width: picture.naturalWidth, height: picture.naturalHeight };
  if (state.blob) drawing.resize(size, picture.clientWidth);
}

/** @param {FileList | undefined} files */
function openFirst(files) {
  const found = [...(files ?? [])].find((each) => each.type.startsWith("image/"));
  if (found) open(found, found.name);
  else notify("that is not an image file");
}

/** Have the server keep the image. Resolves to its name there. @param {AbortSignal} signal */
async function upload(signal) {
  state.id ||= (await (await call("/v1/images", state.blob ?? undefined, signal)).json()).id;
  return state.id;
}

// Regions ------------------------------------------------------------------------------------------------------------

/** @param {number} number */
function write(number) {
  if (chosen("mode").value !== "ask") return;
  say(`Region ${number} is in the question`);
  const [start, end] = [text.selectionStart, text.selectionEnd];
  const space = /\S$/.test(text.value.slice(0, start)) ? " " : "";
  text.setRangeText(`${space}<region${number}>`, start, end, "end");
}

function paintRegions() {
  const items = regions.live.map((region) => {
    const choose = () => {
      drawing.select(region.number);
      write(region.number);
      if (matchMedia("(pointer: fine)").matches) text.focus();
    };
    const remove = () => {
      regions.remove(region.number);
      host.focus();
    };
    const words = nameOf(region).split(", ")[1] ?? "";
    const chip = makeButton("name", choose, make("span", "number", `${region.number}`), words);
    const bin = makeButton("bin", remove, "×");
    chip.setAttribute("aria-label", `${nameOf(region)}: put it into the question`);
    bin.setAttribute("aria-label", `Delete region ${region.number}`);
    const item = make("li", "", chip, bin);
    item.dataset.number = `${region.number}`;
    lights(item, region.number);
    return item;
  });
  part("regions").replaceChildren(...items);
  paintSelected();
  paintMode();
}

function paintSelected() {
  part("undo").disabled = !regions.past.length;
  part("redo").disabled = !regions.future.length;
  part("delete").disabled = !drawing.selected;
  for (const item of document.querySelectorAll("#regions li")) {
    item.classList.toggle("selected", item.getAttribute("data-number") === `${drawing.selected}`);
  }
}

/** @param {string} tool */
function setTool(tool) {
  part(`tool-${tool}`).checked = true;
  drawing.setTool(/** @type {import("./drawing.js").Tool} */ (tool));
  host.dataset.tool = tool;
  part("hint").textContent = chosen("tool").dataset.hint ?? "";
  part("width-label").hidden = tool !== "scribble";
}

// The conversation ---------------------------------------------------------------------------------------------------

function paintMode() {
  const { value: mode, dataset } = chosen("mode");
  const { label = "", hint = "", send = "" } = dataset;
  part("ask").dataset.mode = mode;
  text.placeholder = hint;
  text.setAttribute("aria-label", label);
  part("send").setAttribute("aria-label", running ? "Stop" : send);
  part("send").disabled = !running && (!state.blob || (mode !== "ask" && !regions.live.length));
  part("send").classList.toggle("running", Boolean(running));
  part("need").hidden = mode === "ask" || regions.live.length || !state.blob;
  part("fresh").hidden = !state.turns.length;
  const [first, second] = regions.live.map((region) => `<region${region.number}>`);
  const ideas = first ? [`What is ${first}?`, `Describe ${first} in detail.`] : [];
  if (second) ideas.push(`What is ${first} doing next to ${second}?`);
  part("ideas").hidden = mode !== "ask" || state.turns.length;
  part("ideas").replaceChildren(...ideas.map((idea) => makeButton("idea", () => ask(idea), idea)));
}

/** @param {Turn} turn */
function paintTurn({ question, items, warnings = [], note, error }) {
  const article = make("article", "turn");
  article.append(make("p", "question", make("span", "hidden", "You: "), ...withReferences(question)));
  for (const { number, text, pending, bars = [] } of items) {
    const words = make("p", pending ? "pending" : "", ...withReferences(text));
    const answer = make("div", "answer", ...(number ? [reference(number, "")] : []), words);
    if (bars.length) answer.append(make("ul", "bars", ...bars.map(paintBar)));
    article.append(answer);
  }
  for (const words of [...warnings, note]) if (words) article.append(make("p", "faint", words));
  if (error) article.append(make("p", "error", error));
  return article;
}

/** @param {[string, number]} bar */
function paintBar([name, value]) {
  const fill = make("span", "fill");
  fill.style.width = `${value * 100}%`;
  const share = value > 0 && value < 0.01 ? "< 1 %" : `${Math.round(value * 100)} %`;
  return make("li", "", make("span", "label", name), make("span", "track", fill), make("span", "value", share));
}

function paintLog() {
  part("empty").hidden = state.turns.length;
  log.replaceChildren(part("empty"), ...state.turns.map(paintTurn));
  log.lastElementChild?.scrollIntoView({ block: "nearest" });
  paintMode();
}

/** Add a turn, and have an action fill it.
 * @param {Turn} turn @param {(signal: AbortSignal, update: () => void) => Promise<void>} action
 */
async function run(turn, action) {
  const mine = new AbortController();
  running = mine;
  state.turns.push(turn);
  paintLog();
  log.setAttribute("aria-busy", "true");
  const update = () => {
    const old = log.lastElementChild;
    if (state.turns.at(-1) !== turn || !old) return;
    const isRead = old.getBoundingClientRect().bottom < innerHeight; // or the person has scrolled up
    old.replaceWith(paintTurn(turn));
    if (isRead) log.lastElementChild?.scrollIntoView({ block: "end" });
  };
  try {
    await action(mine.signal, update).catch((error) => {
      if (error.code !== "image_not_found") throw error;
      state.id = ""; // The server has forgotten it: send it again.
      return action(mine.signal, update);
    });
  } catch (error) {
    if (mine.signal.aborted) turn.note = "Stopped";
    else {
      turn.error = error instanceof Error ? error.message : `${error}`;
      text.value ||= turn.mode === "ask" ? turn.question : "";
    }
  }
  for (const item of turn.items) item.pending = false;
  if (running === mine) running = null;
  log.removeAttribute("aria-busy");
  update();
  paintMode();
  save();
}

/** @param {string} question */
async function ask(question) {
  text.value = "";
  /** @type {Item} */
  const answer = { text: "", pending: true };
  /** @type {Turn} */
  const turn = { mode: "ask", question, items: [answer] };
  await run(turn, async (signal, update) => {
    const image = { type: "image_url", image_url: { url: await upload(signal) } };
    const past = state.turns.filter(({ mode, error, items }) => mode === "ask" && !error && items[0]?.text);
    // Only what the conversation names is sent, numbered anew; the answer's numbers are turned back.
    const said = [...past, turn].map((each) => [each.question, each.items[0]?.text ?? ""]);
    const numbers = new Set([...`${said}`.matchAll(NUMBERS)].map((match) => Number(match[2])));
    const named = [...numbers].filter((number) => regions.all[number - 1]).sort((a, b) => a - b);
    const sent = (/** @type {string} */ words) =>
      words.replace(NUMBERS, (_, head, number) => `${head}${named.indexOf(Number(number)) + 1 || number}`);
    const messages = said.flatMap(([question = "", words = ""], index) => [
      { role: "user", content: [...(index ? [] : [image]), { type: "text", text: sent(question) }] },
      { role: "assistant", content: sent(words) },
    ]);
    const listed = regions.all.filter(({ number }) => named.includes(number));
    const body = { messages: messages.slice(0, -1), regions: listed.map(toApi) };
    let raw = "";
    for await (const { choices, cited, warnings } of stream("/v1/chat/completions", body, signal)) {
      raw += choices[0]?.delta?.content ?? "";
      answer.text = raw.replace(NUMBERS, (_, head, number) => `${head}${named[number - 1] ?? number}`);
      if (warnings) turn.warnings = warnings;
      if (choices[0]?.finish_reason === "length") turn.note = "Cut short: the answer reached its limit";
      if (cited) drawing.light(cited.map((/** @type {number} */ number) => named[number - 1]));
      update();
    }
  });
}

/** What the requests about all regions have in common. @param {AbortSignal} signal */
const allRegions = async (signal) => ({ image: await upload(signal), regions: regions.live.map(toApi) });

async function describe() {
  const brief = part("brief").checked;
  const items = regions.live.map(({ number }) => ({ number, text: "", pending: true }));
  /** @type {Turn & {warnings: string[]}} */
  const turn = { mode: "describe", question: `Describe all regions${brief ? " briefly" : ""}`, items, warnings: [] };
  await run(turn, async (signal, update) => {
    for await (const event of stream("/v1/regions/describe", { ...(await allRegions(signal)), brief }, signal)) {
      Object.assign(items[event.index] ?? {}, { text: `${event.answer}${event.complete ? "" : " …"}`, pending: false });
      turn.warnings.push(...event.warnings);
      update();
    }
  });
}

/** @param {string} names */
async function classify(names) {
  const listed = regions.live;
  const given = [...new Set(names.split(/[,;\n]/).map((name) => name.trim()))].filter(Boolean);
  /** @type {Turn} */
  const turn = { mode: "classify", question: `Classify: ${given.join(", ") || "COCO's 80 names"}`, items: [] };
  await run(turn, async (signal) => {
    const body = { ...(await allRegions(signal)), choices: given.length ? given : null, top_k: 8 };
    const found = await (await call("/v1/regions/classify", body, signal)).json();
    turn.items = listed.map(({ number }, index) => {
      const { label, probabilities } = found.regions[index];
      return { number, text: label, bars: Object.entries(probabilities) };
    });
  });
}

/** @param {string} expression */
async function locate(expression) {
  const listed = regions.live;
  /** @type {Turn} */
  const turn = { mode: "locate", question: `Locate: ${expression}`, items: [] };
  await run(turn, async (signal) => {
    const body = { ...(await allRegions(signal)), expression };
    const [found] = (await (await call("/v1/regions/locate", body, signal)).json()).results;
    const names = [...listed.map(({ number }) => `Region [${number}]`), "none of them"];
    const bars = names.map((name, index) => /** @type {[string, number]} */ ([name, found.probabilities[index]]));
    const number = listed[(found.number || Infinity) - 1]?.number;
    turn.items = [{ text: number ? `Region [${number}]` : "None of them", bars }];
    if (number) drawing.light([number]);
  });
}

function submit() {
  const [mode, words] = [chosen("mode").value, text.value.trim()];
  if (running) running.abort();
  else if (part("send").disabled) return;
  else if (mode === "describe") describe();
  else if (mode === "classify") classify(words);
  else if (!words) text.focus();
  else if (mode === "locate") locate(words);
  else ask(words);
}

// Wiring -------------------------------------------------------------------------------------------------------------

const facts = () => ({ name: state.name, width: picture.naturalWidth, height: picture.naturalHeight });

function startOver() {
  running?.abort();
  state.turns = [];
  drawing.light([]);
  regions.reset(regions.all);
  paintLog();
}

/** @type {Record<string, () => void>} What a click on the button of a name does. */
const CLICKS = {
  open: () => file.click(),
  choose: () => file.click(),
  undo: () => regions.undo(),
  redo: () => regions.redo(),
  delete: () => drawing.selected && regions.remove(drawing.selected),
  fresh: startOver,
  help: () => help.showModal(),
  "notice-close": () => notify(""),
  "save-json": () => download(`${state.name}.json`, asJson(facts(), regions.all, state.turns)),
  "save-coco": () => download(`${state.name}.coco.json`, asCoco(facts(), regions.live, state.turns)),
};
for (const [id, action] of Object.entries(CLICKS)) part(id).addEventListener("click", action);
for (const example of document.querySelectorAll("[data-example]")) {
  const name = example.getAttribute("data-example") ?? "";
  const load = async () => open(await (await call(`/page/examples/${name}`)).blob(), name);
  example.addEventListener("click", () => load().catch(notify));
}
part("tool").addEventListener("change", () => setTool(chosen("tool").value));
part("mode").addEventListener("change", paintMode);
part("width").addEventListener("input", () => {
  drawing.brush = Number(part("width").value) / 1000;
});
part("ask").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  submit();
});
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) submit();
});
file.addEventListener("change", () => {
  openFirst(file.files ?? undefined);
  file.value = "";
});
document.addEventListener("paste", ({ clipboardData: pasted }) => pasted?.files.length && openFirst(pasted.files));
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    const { dataTransfer } = /** @type {DragEvent} */ (event);
    if (!dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", type === "dragover");
    if (type === "drop") openFirst(dataTransfer.files);
  });
}
document.addEventListener("keydown", (event) => {
  if (event.target === text || help.open || keyBox.open) return;
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && (key === "z" || key === "y")) {
    event.preventDefault();
    if (key === "y" || event.shiftKey) regions.redo();
    else regions.undo();
  } else if (key === "h" && event.target === host) help.showModal();
});
keys.ask = () => {
  const input = part("key");
  input.value = "";
  keyBox.returnValue = "";
  keyBox.showModal();
  return new Promise((resolve) => {
    const answer = () => resolve(keyBox.returnValue === "ok" ? input.value : "");
    keyBox.addEventListener("close", answer, { once: true });
  });
};
new ResizeObserver(resize).observe(picture);

setTool("box");
paintRegions();
paintLog();
const before = JSON.parse(sessionStorage.getItem("state") ?? "{}");
state.key = before.key ?? "";
const blob = before.key && (await keptImage(before.key).catch(() => undefined));
if (blob) {
  await open(blob, before.name, before.turns);
  regions.reset(before.regions);
  paintLog();
}
const showModel = async () => (part("model").textContent = (await (await call("/v1/models")).json()).data[0].id);
showModel().catch(notify);
