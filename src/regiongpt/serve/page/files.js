/** What the page keeps over a reload, and what it gives to take away. */

import { boundsOf, ringOf, toApi } from "./regions.js";

/** @typedef {import("./regions.js").Region} Region */
/** @typedef {{name: string, width: number, height: number}} ImageFacts */
/** @typedef {{number?: number, text: string, pending?: boolean, bars?: [string, number][]}} Item */
/**
 * A question and what came of it: an answer, or an item for each region. Bars are names and probabilities.
 * @typedef {{mode: string, question: string, items: Item[], warnings?: string[], note?: string, error?: string}} Turn
 */

const DAY = 24 * 3600 * 1000;
// Browsers have this store on https and on this machine alone; elsewhere a reload begins anew.
const store = globalThis.caches?.open("regiongpt");

/** Keep an image for a day in place of an old one. Resolves to its key. @param {Blob} blob @param {string} old */
export async function keepImage(blob, old) {
  const cache = await store;
  if (old) await cache?.delete(old);
  for (const request of (await cache?.keys()) ?? []) {
    const time = Number((await cache?.match(request))?.headers.get("x-time"));
    if (time < Date.now() - DAY) await cache?.delete(request);
  }
  const key = `/kept/${crypto.getRandomValues(new Uint32Array(4)).join("-")}`;
  await cache?.put(key, new Response(blob, { headers: { "x-time": `${Date.now()}` } }));
  return key;
}

/** @param {string} key */
export const keptImage = async (key) => (await (await store)?.match(key))?.blob();

/** @param {string} name @param {object} value */
export function download(name, value) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Regions that were deleted come too, where the conversation names them.
 * @param {ImageFacts} image @param {Region[]} regions @param {Turn[]} conversation
 */
export function asJson(image, regions, conversation) {
  const listed = regions.map((region) => ({ number: region.number, deleted: region.gone, ...toApi(region) }));
  return { image, regions: listed, conversation };
}

/** COCO instances as the package writes them, with what was said of them; what is no box or polygon becomes RLE.
 * @param {ImageFacts} image @param {Region[]} regions @param {Turn[]} conversation
 */
export function asCoco(image, regions, conversation) {
  const { name: file_name, width, height } = image;
  const annotations = regions.map((region) => {
    const { x0, y0, x1, y1, area: whole } = boundsOf(region);
    const [left, top] = [Math.max(0, x0), Math.max(0, y0)];
    const bbox = [left, top, Math.min(width, x1) - left, Math.min(height, y1) - top];
    const head = { id: region.number, image_id: 1, category_id: 1, iscrowd: 0, bbox };
    for (const { text, number, bars } of conversation.flatMap((turn) => turn.items)) {
      if (number === region.number)
        Object.assign(head, bars ? { label: text, probability: bars[0]?.[1] } : { caption: text });
    }
    if (region.kind === "box") return { ...head, area: whole, segmentation: [] };
    const { counts, area } = runsOf(region, image);
    const rle = { size: [height, width], counts };
    return { ...head, area, segmentation: region.kind === "polygon" ? [region.points.flat()] : rle };
  });
  return { images: [{ id: 1, file_name, width, height }], annotations, categories: [{ id: 1, name: "region" }] };
}

/** The pixels inside a region, painted and counted down each column: runs outside and inside in turn.
 * @param {Region} region @param {ImageFacts} image
 */
function runsOf(region, { width, height }) {
  const context = new OffscreenCanvas(width, height).getContext("2d");
  if (!context) throw new Error("this browser cannot paint masks");
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = region.width ?? 1;
  for (const [x, y] of [...region.points.slice(0, 1), ...ringOf(region)]) context.lineTo(x, y);
  if (region.kind === "polygon") context.fill("evenodd");
  else context.stroke();
  const { data } = context.getImageData(0, 0, width, height);
  const counts = [0];
  let [area, inside] = [0, false];
  for (let at = 0; at < width * height; at++) {
    const now = (data[((at % height) * width + Math.floor(at / height)) * 4 + 3] ?? 0) > 127;
    if (now !== inside) counts.push(0);
    counts[counts.length - 1] = (counts.at(-1) ?? 0) + 1;
    area += Number(now);
    inside = now;
  }
  return { counts, area };
}
