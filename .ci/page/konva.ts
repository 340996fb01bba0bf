// What the page uses of Konva; the build puts it into src/regiongpt/serve/page/konva.js.
import { Konva } from "konva/lib/_CoreInternals.js";

export { Circle } from "konva/lib/shapes/Circle.js";
export { Line } from "konva/lib/shapes/Line.js";
export { Text } from "konva/lib/shapes/Text.js";
export const { Group, Layer, Stage } = Konva;
