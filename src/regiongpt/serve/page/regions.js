/** The regions of an image: their shapes, numbers and history. Points are [x, y] in pixels of the image. */

/** @typedef {[number, number]} Point */
/** @typedef {"box" | "polygon" | "scribble" | "point"} Kind */
/** @typedef {{width: number, height: number}} Size */
/**
 * A box has two opposite corners, a scribble and a point the width of their stroke. What is `gone` was deleted, but
 * keeps its number while the conversation names it.
 * @typedef {{number: number, kind: Kind, points: Point[], width?: number, gone?: boolean}} Region
 */

// The palette of the package's own drawings (Okabe and Ito); the number, not the colour, tells regions apart.
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#f0e442"];
const NAMES = { box: "box", polygon: "polygon", scribble: "brush", point: "point" };

/** @param {number} number */
export const colourOf = (number) => COLOURS[(number - 1) % COLOURS.length] ?? "#000";
/** @param {number} number The colour of text on the region's own colour. */
export const inkOf = (number) => (colourOf(number) === "#0072b2" ? "#fff" : "#111");
/** @param {Region} region */
export const nameOf = (region) => `Region ${region.number}, ${NAMES[region.kind]}`;
/** @param {number} value @param {number} low @param {number} high */
export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** @param {Omit<Region, "number">} region */
export function boundsOf({ points, width = 0 }) {
  const [xs, ys] = [points.map((point) => point[0]), points.map((point) => point[1])];
  const [x0, y0] = [Math.min(...xs) - width / 2, Math.min(...ys) - width / 2];
  const [x1, y1] = [Math.max(...xs) + width / 2, Math.max(...ys) + width / 2];
  return { x0, y0, x1, y1, area: (x1 - x0) * (y1 - y0) };
}

/** A box's or polygon's corners in order. @param {Omit<Region, "number">} region @returns {Point[]} */
export function ringOf(region) {
  if (region.kind !== "box") return region.points;
  const { x0, y0, x1, y1 } = boundsOf(region);
  // biome-ignore format: a box at a glance
  return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
}

/** Moved as far as its points stay inside the image. @param {Region} region @param {Point} by @param {Size} size */
export function moved(region, [dx, dy], size) {
  const { x0, y0, x1, y1 } = boundsOf({ ...region, width: 0 });
  const [right, down] = [clamp(dx, -x0, size.width - x1), clamp(dy, -y0, size.height - y1)];
  return { ...region, points: region.points.map(([x, y]) => /** @type {Point} */ ([x + right, y + down])) };
}

/** The region as the API takes it. @param {Region} region */
export function toApi(region) {
  const { kind, width = 0 } = region;
  const rounded = ringOf(region).map((point) => point.map((value) => Math.round(value * 10) / 10));
  if (kind === "box") return { box: [rounded[0], rounded[2]].flat() };
  if (kind === "polygon") return { polygon: [rounded] };
  return kind === "point" ? { point: rounded[0], radius: width / 2 } : { scribble: rounded, width };
}

/** The list of regions, number N at place N - 1, with undo and redo. */
export class Regions {
  /** @type {Region[]} */
  all = [];
  /** @type {Region[][]} */
  past = [];
  /** @type {Region[][]} */
  future = [];
  #moving = 0;

  /** @param {() => void} changed @param {(number: number) => boolean} isNamed Whether the conversation names one. */
  constructor(changed, isNamed) {
    this.changed = changed;
    this.isNamed = isNamed;
  }

  get live() {
    return this.all.filter((region) => !region.gone);
  }

  /** @param {number | null} number */
  get(number) {
    return this.live.find((region) => region.number === number);
  }

  /** @param {Region[]} all */
  reset(all) {
    this.past = [];
    this.future = [];
    this.#show(all);
  }

  /** @param {Omit<Region, "number">} region */
  add(region) {
    const added = { ...region, number: this.all.length + 1 };
    this.#do([...this.all, added]);
    return added;
  }

  /** @param {Region} region @param {boolean} goesOn Whether undo takes it for one step with the last such call. */
  replace(region, goesOn = false) {
    const all = this.all.map((old) => (old.number === region.number ? region : old));
    if (goesOn && this.#moving === region.number) this.#show(all);
    else this.#do(all);
    this.#moving = goesOn ? region.number : 0;
  }

  /** @param {number} number */
  remove(number) {
    this.#do(this.all.map((old) => (old.number === number ? { ...old, gone: true } : old)));
  }

  undo(from = this.past, to = this.future) {
    const next = from.pop();
    if (!next) return;
    to.push(this.all);
    this.#show([...next, ...this.all.slice(next.length).map((region) => ({ ...region, gone: true }))]);
  }

  redo() {
    this.undo(this.future, this.past);
  }

  /** @param {Region[]} all */
  #do(all) {
    this.past.push(this.all);
    this.future = [];
    this.#show(all);
  }

  /** @param {Region[]} all */
  #show(all) {
    let length = all.length;
    while (all[length - 1]?.gone && !this.isNamed(length)) length--;
    this.all = all.slice(0, length);
    this.#moving = 0;
    this.changed();
  }
}
