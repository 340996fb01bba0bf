// The types of konva.js for the check by .ci/page/build; no browser asks for this file.
export * from "../../../../.ci/page/konva.ts";
