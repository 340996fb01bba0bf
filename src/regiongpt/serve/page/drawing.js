/** Drawing regions on an image with mouse, pen, finger and keys. Konva paints, drags and says what lies where. */

import { Circle, Group, Layer, Line, Stage, Text } from "./konva.js";
import { boundsOf, clamp, colourOf, inkOf, moved, nameOf, ringOf } from "./regions.js";

/** @typedef {import("./regions.js").Region} Region */
/** @typedef {import("./regions.js").Point} Point */
/** @typedef {"select" | import("./regions.js").Kind} Tool */
/** @typedef {Omit<Region, "number">} Draft */
/**
 * What the drawing tells: a region (or null) was chosen, a sentence for screen readers, a key asked for a tool,
 * selection or draft changed.
 * @typedef {{pick(number: number | null): void, say(words: string): void, tool(tool: string): void,
 *   change(): void}} Listener
 */

const STILL = 5; // pixels of the screen within which a press that moves is a click
const NEAR = 14; // pixels of the screen within which a click closes a polygon
const SPOT = 0.03; // width of a point's dot, as a share of the image's longer side: the package's own default
const MOST_HANDLES = 40;
/** Where the number is, from the first corner or the highest point: beside what would be hidden. @type {Record<string, Point>} */
const BESIDE = { box: [14, 14], polygon: [0, -18], scribble: [0, 0], point: [16, -16] };
/** @type {Record<string, Point>} */
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
/** @type {Record<string, Tool>} */
const TOOLS = { s: "select", b: "box", p: "polygon", r: "scribble", o: "point" };
/** @param {Point} point */
const words = ([x, y]) => `${Math.round(x)}, ${Math.round(y)}`;

export class Drawing {
  /** @type {Tool} */
  tool = "box";
  /** @type {number | null} */
  selected = null;
  /** @type {number[]} Regions that are lit up. */
  lit = [];
  brush = 0.03; // width, as a share of the image's longer side
  size = { width: 1, height: 1 };
  #side = 1;
  #px = 1; // pixels of the image that are one of the screen
  /** @type {Draft | null} */
  draft = null;
  /** @type {Point | null} The cross that the arrow keys move. */
  #cross = null;
  /** @type {Region | null} A region as it is while its corner is dragged. */
  #preview = null;
  /** @type {{at: Point, lasso: boolean} | null} The press of a mouse button, pen or finger. */
  #press = null;
  #shade = new Layer({ listening: false });
  #painted = new Layer();
  #handles = new Layer();
  #top = new Layer({ listening: false });

  /** @param {HTMLDivElement} host @param {import("./regions.js").Regions} regions @param {Listener} on */
  constructor(host, regions, on) {
    this.host = host;
    this.regions = regions;
    this.on = on;
    this.stage = new Stage({ container: host.appendChild(document.createElement("div")), width: 1, height: 1 });
    this.stage.add(this.#shade, this.#painted, this.#handles, this.#top);
    host.addEventListener("pointerdown", (event) => event.isPrimary && event.button === 0 && this.#down(event));
    host.addEventListener("pointermove", (event) => event.isPrimary && this.#press && this.#move(event, this.#press));
    host.addEventListener("pointerup", (event) => event.isPrimary && this.#press && this.#up(event, this.#press));
    host.addEventListener("pointercancel", () => {
      this.#press = null;
      this.#setDraft(null);
    });
    host.addEventListener("keydown", (event) => this.#key(event));
    // Else a browser takes a quick stroke for a fling, and the next tap for its end.
    host.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
    host.addEventListener("blur", () => this.#setCross(null));
  }

  /** @param {{width: number, height: number}} size Of the image. @param {number} width That it has on the screen. */
  resize(size, width) {
    this.size = size;
    this.#px = size.width / width || 1;
    this.#side = Math.max(size.width, size.height);
    this.stage.size({ width, height: size.height / this.#px });
    this.stage.scale({ x: 1 / this.#px, y: 1 / this.#px });
    this.paint();
  }

  /** @param {Tool} tool */
  setTool(tool) {
    this.tool = tool;
    this.#setDraft(null);
    this.paint();
  }

  /** @param {number | null} number */
  select(number) {
    this.selected = number;
    this.paint();
    this.on.change();
  }

  /** @param {number[]} numbers */
  light(numbers) {
    this.lit = numbers;
    this.paint();
  }

  #finish() {
    if (this.draft && !this.#isTooSmall(this.draft)) this.#add(this.draft);
    else this.#setDraft(null);
  }

  paint() {
    if (!this.regions.get(this.selected)) this.selected = null;
    this.#paintRegions();
    this.#paintHandles();
    this.#paintTop();
  }

  #paintRegions() {
    const regions = this.regions.live.map((each) => (each.number === this.#preview?.number ? this.#preview : each));
    regions.sort((a, b) => boundsOf(b).area - boundsOf(a).area); // Those inside others must lie on top.
    this.#painted.destroyChildren();
    this.#shade.destroyChildren();
    const lit = regions.filter((region) => this.lit.includes(region.number));
    const { width, height } = this.size;
    const dark = { points: [0, 0, width, 0, width, height, 0, height], closed: true, fill: "#000a" };
    if (lit.length) this.#shade.add(new Line(dark));
    const hole = { fill: "#000", stroke: "#000", globalCompositeOperation: /** @type {const} */ ("destination-out") };
    for (const region of lit) this.#shade.add(this.#line(region, hole));
    for (const region of regions) {
      const group = this.#shape(region, colourOf(region.number));
      group.id(`${region.number}`);
      group.add(this.#badge(region));
      group.opacity(lit.length && !lit.includes(region) ? 0.4 : 1);
      if (this.tool === "select") this.#makeDraggable(group, region);
      this.#painted.add(group);
    }
  }

  /** @param {Draft} region @param {import("konva/lib/shapes/Line.js").LineConfig} look */
  #line(region, look) {
    const { kind, points, width = 0 } = region;
    if (kind === "box" || kind === "polygon") {
      const closed = region !== this.draft || kind === "box";
      return new Line({ points: ringOf(region).flat(), closed, strokeScaleEnabled: false, lineJoin: "round", ...look });
    }
    const ends = points.length > 1 ? points : [...points, ...points];
    const strokeWidth = width + (look.strokeWidth ?? 0) * this.#px;
    const hitStrokeWidth = Math.max(width, 24 * this.#px);
    return new Line({ points: ends.flat(), lineCap: "round", lineJoin: "round", ...look, strokeWidth, hitStrokeWidth });
  }

  /** @param {Draft} region @param {string} colour */
  #shape(region, colour) {
    const number = "number" in region ? region.number : 0;
    const [lit, chosen] = [this.lit.includes(Number(number)), number === this.selected];
    const more = lit || chosen ? 2 : 0;
    const [halo, line, opacity] = region.width ? [3, 0, lit ? 0.5 : 0.75] : [5, 2.5, 1];
    const fill = colour + (lit ? "00" : chosen ? "40" : "26");
    const group = new Group();
    group.add(this.#line(region, { stroke: "#fffc", strokeWidth: halo + more, listening: false }));
    group.add(this.#line(region, { stroke: colour, strokeWidth: line && line + more, fill, opacity }));
    return group;
  }

  /** @param {Region} region */
  #badge(region) {
    const px = this.#px;
    const top = ringOf(region).reduce((best, point) => (point[1] < best[1] ? point : best));
    const [dx, dy] = BESIDE[region.kind] ?? [0, 0];
    const x = clamp(top[0] + dx * px, 12 * px, this.size.width - 12 * px);
    const y = clamp(top[1] + dy * px, 12 * px, this.size.height - 12 * px);
    const badge = new Group({ x, y, scaleX: px, scaleY: px });
    const text = new Text({ text: `${region.number}`, fontSize: 13, fontStyle: "bold", fontFamily: "system-ui" });
    text.setAttrs({ fill: inkOf(region.number), offsetX: text.width() / 2, offsetY: text.height() / 2 - 0.5 });
    badge.add(new Circle({ radius: 11, fill: colourOf(region.number), stroke: "#fff", strokeWidth: 1.5 }), text);
    return badge;
  }

  /** @param {import("konva/lib/Group.js").Group} group @param {Region} region */
  #makeDraggable(group, region) {
    const there = () => moved(region, [group.x(), group.y()], this.size);
    group.setAttrs({ draggable: true, dragDistance: STILL });
    group.on("dragstart", () => {
      this.selected = region.number;
      this.lit = [];
      this.#handles.destroyChildren();
    });
    group.on("dragmove", () => {
      const [[x0, y0] = [0, 0], [x1, y1] = [0, 0]] = [region.points[0], there().points[0]];
      group.position({ x: x1 - x0, y: y1 - y0 });
    });
    group.on("dragend", () => this.regions.replace(there()));
    group.on("mouseenter", () => this.host.classList.add("over"));
    group.on("mouseleave", () => this.host.classList.remove("over"));
  }

  #paintHandles() {
    this.#handles.destroyChildren();
    const region = this.tool === "select" && this.regions.get(this.selected);
    if (!region || region.width || region.points.length > MOST_HANDLES) return;
    const px = this.#px;
    ringOf(region).forEach(([x, y], index, ring) => {
      const handle = new Circle({ x, y, radius: 6 * px, strokeWidth: 2.5 * px, hitStrokeWidth: 24 * px });
      handle.setAttrs({ fill: "#fff", stroke: colourOf(region.number), draggable: true });
      handle.on("dragmove", () => {
        const at = this.#inside([handle.x(), handle.y()]);
        handle.position({ x: at[0], y: at[1] });
        const opposite = ring[(index + 2) % 4] ?? at;
        const points = region.kind === "box" ? [at, opposite] : ring.map((old, place) => (place === index ? at : old));
        this.#preview = { ...region, points };
        this.#paintRegions();
      });
      handle.on("dragend", () => {
        const preview = this.#preview;
        this.#preview = null;
        if (preview && !this.#isTooSmall(preview)) this.regions.replace(preview);
        else this.paint();
      });
      this.#handles.add(handle);
    });
  }

  #paintTop() {
    this.#top.destroyChildren();
    const px = this.#px;
    if (this.draft) this.#top.add(this.#shape(this.draft, colourOf(this.regions.all.length + 1)));
    const corners = this.draft?.kind === "polygon" && !this.#press?.lasso ? this.draft.points : [];
    const look = { fill: "#fff", stroke: "#111", strokeWidth: px };
    this.#top.add(...corners.map(([x, y], index) => new Circle({ x, y, radius: (index ? 4 : 7) * px, ...look })));
    const [x, y] = this.#cross ?? [-9, -9];
    const across = { points: [0, y, this.size.width, y] };
    const down = { points: [x, 0, x, this.size.height] };
    for (const look of [
      { stroke: "#fffc", strokeWidth: 3 * px },
      { stroke: "#111", strokeWidth: px },
    ]) {
      this.#top.add(new Line({ ...across, ...look }), new Line({ ...down, ...look }));
    }
  }

  /** @param {MouseEvent} event */
  #at(event) {
    const box = this.host.getBoundingClientRect();
    return this.#inside([(event.clientX - box.left) * this.#px, (event.clientY - box.top) * this.#px]);
  }

  /** @param {Point} point @returns {Point} */
  #inside([x, y]) {
    return [clamp(x, 0, this.size.width), clamp(y, 0, this.size.height)];
  }

  /** @param {PointerEvent} event */
  #down(event) {
    const at = this.#at(event);
    this.#press = { at, lasso: false };
    this.#setCross(null);
    if (this.tool === "select") return; // Konva may begin to drag what is painted.
    if (this.lit.length) this.light([]);
    this.host.setPointerCapture(event.pointerId);
    if (this.tool === "box" || this.tool === "scribble") this.#begin(at);
  }

  /** @param {PointerEvent} event @param {{at: Point, lasso: boolean}} press */
  #move(event, press) {
    const at = this.#at(event);
    if (this.tool === "polygon" && !this.draft && this.#far(press.at, at, STILL)) {
      press.lasso = true;
      this.draft = { kind: "polygon", points: [press.at] };
    }
    if (this.draft?.kind === "box") this.draft.points = [press.at, at];
    else if (this.draft && (this.draft.kind === "scribble" || press.lasso)) {
      const between = event.getCoalescedEvents?.() ?? [];
      for (const each of [...between, event]) this.#append(this.draft, this.#at(each));
    }
    this.#paintTop();
  }

  /** @param {PointerEvent} event @param {{at: Point, lasso: boolean}} press */
  #up(event, press) {
    const at = this.#at(event);
    this.#press = null;
    const still = !this.#far(press.at, at, STILL);
    if (this.tool === "point" || (this.tool === "polygon" && !press.lasso)) this.#set(at);
    else if (this.tool !== "select") this.#finish();
    if (still && (this.tool === "select" || this.tool === "box")) this.#pickAt(at);
  }

  /** @param {Point} at Where a box or stroke begins. */
  #begin(at) {
    if (this.tool === "box") this.#setDraft({ kind: "box", points: [at, at] });
    else this.#setDraft({ kind: "scribble", points: [at], width: Math.max(1, this.brush * this.#side) });
  }

  /** @param {Point} at A point, or a corner of a polygon; upon its first or last corner it ends. */
  #set(at) {
    if (this.tool === "point") return this.#add({ kind: "point", points: [at], width: Math.max(2, SPOT * this.#side) });
    const points = this.draft?.points ?? [];
    const [first, last] = [points[0], points.at(-1)];
    const again = (first && !this.#far(first, at, NEAR)) || (last && !this.#far(last, at, STILL));
    if (!again) this.#setDraft({ kind: "polygon", points: [...points, at] });
    else if (points.length >= 3) this.#finish();
  }

  /** @param {Draft} draft @param {Point} at */
  #append(draft, at) {
    const last = draft.points.at(-1);
    if (!last || this.#far(last, at, 3)) draft.points.push(at);
  }

  /** @param {Point} a @param {Point} b @param {number} distance In pixels of the screen. */
  #far(a, b, distance) {
    return Math.hypot(a[0] - b[0], a[1] - b[1]) >= distance * this.#px;
  }

  /** @param {Draft} draft */
  #isTooSmall(draft) {
    const { x0, y0, x1, y1 } = boundsOf(draft);
    return Math.min(x1 - x0, y1 - y0) < (draft.width ? 0 : 3 * this.#px);
  }

  /** @param {Draft} draft */
  #add(draft) {
    const region = this.regions.add(draft);
    this.#setDraft(null);
    this.select(region.number);
    const { x0, y0, x1, y1 } = boundsOf(region);
    this.on.say(`${nameOf(region)} drawn, from ${words([x0, y0])} to ${words([x1, y1])}`);
  }

  /** @param {Draft | null} draft */
  #setDraft(draft) {
    this.draft = draft;
    this.#paintTop();
    this.on.change();
  }

  /** @param {Point} at */
  #pickAt([x, y]) {
    const shape = this.stage.getIntersection({ x: x / this.#px, y: y / this.#px });
    if (shape?.getLayer() === this.#handles) return;
    this.#pick(Number(shape?.findAncestor((/** @type {{id(): string}} */ node) => node.id())?.id()) || null);
  }

  /** @param {number | null} number */
  #pick(number) {
    this.lit = [];
    this.select(number);
    this.on.pick(number);
  }

  /** @param {Point | null} at */
  #setCross(at) {
    this.#cross = at;
    this.#paintTop();
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const [arrow, tool, region] = [ARROWS[event.key], TOOLS[event.key], this.regions.get(this.selected)];
    if (event.altKey || event.metaKey || (event.ctrlKey && !arrow)) return;
    if (arrow) this.#arrow(arrow, event.ctrlKey ? 1 : this.#side * (event.shiftKey ? 0.05 : 0.01));
    else if (event.key === "Enter" || event.key === " ") this.#act();
    else if (tool) this.on.tool(tool);
    else if (/^[1-9]$/.test(event.key)) {
      const chosen = this.regions.get(Number(event.key));
      this.select(chosen?.number ?? null);
      this.on.say(chosen ? `${nameOf(chosen)}, selected` : `No region ${event.key}`);
    } else if ((event.key === "Delete" || event.key === "Backspace") && region) {
      this.regions.remove(region.number);
      this.on.say(`${nameOf(region)}, deleted`);
    } else if (event.key === "Escape") {
      this.on.say(this.draft ? "Given up" : "Nothing selected");
      if (!this.draft) this.select(null);
      this.#setDraft(null);
    } else return;
    event.preventDefault();
  }

  /** @param {Point} arrow @param {number} step In pixels of the image. */
  #arrow([dx, dy], step) {
    const region = this.tool === "select" && this.regions.get(this.selected);
    if (region) {
      const there = moved(region, [dx * step, dy * step], this.size);
      this.regions.replace(there, true);
      const { x0, y0 } = boundsOf(there);
      return this.on.say(`${nameOf(there)}, at ${words([x0, y0])}`);
    }
    const [x, y] = this.#cross ?? [this.size.width / 2, this.size.height / 2];
    const at = this.#inside([x + dx * step, y + dy * step]);
    if (this.draft?.kind === "box") this.draft.points = [this.draft.points[0] ?? at, at];
    if (this.draft?.kind === "scribble") this.#append(this.draft, at);
    this.#setCross(at);
    this.on.say(words(at));
  }

  /** Do what the tool does, where the cross is. */
  #act() {
    if (this.tool === "select" && this.selected) return this.#pick(this.selected);
    const at = this.#cross ?? /** @type {Point} */ ([this.size.width / 2, this.size.height / 2]);
    this.#setCross(at);
    if (this.tool === "select") return this.#pickAt(at);
    const count = this.regions.live.length;
    if (this.tool === "point" || this.tool === "polygon") this.#set(at);
    else if (this.draft) this.#finish();
    else this.#begin(at);
    if (this.regions.live.length === count) this.on.say(`${this.draft ? "Begun" : "Too small"}, at ${words(at)}`);
  }
}
