#!/usr/bin/env bash
# @annotorious/annotorious 3.8.10, image annotator, drawingMode "click", in Chromium; two surprises:
# 1. expected: a polygon is drawn by taps as it is by clicks. Seen: a corner is set where the pointer last moved, and a
#    tap that holds still moves nothing, so every corner falls on the first, and neither a double tap nor a long
#    press nor a tap on the first corner ends the polygon. Taps that slide by 2 pixels work, as a mouse does.
# 2. expected: colours given by `style` show under a policy that allows the page's own scripts and style sheets. Seen:
#    they are written as `style` attributes, which the policy refuses, so every region is white, without an error.
# Needs node, npm and Chromium (CHROMIUM, or /usr/bin/chromium).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export TMPDIR=$work
echo '{"private": true}' >package.json
npm install --silent --no-audit --no-fund @annotorious/annotorious@3.8.10 playwright-core@1.65.1
cat >surprises.cjs <<'JS'
const assert = require("node:assert");
const fs = require("node:fs");
const http = require("node:http");
const { chromium } = require("playwright-core");

const folder = "node_modules/@annotorious/annotorious/";
const files = {
  "/": ["text/html", `<!doctype html><link rel="stylesheet" href="a.css"><script src="a.js"></script>
    <img id="image" src="image.svg" width="400" height="300"><script src="page.js"></script>`],
  "/a.css": ["text/css", fs.readFileSync(folder + "dist/annotorious.css")],
  "/a.js": ["text/javascript", fs.readFileSync(folder + "dist/annotorious.js")],
  "/image.svg": ["image/svg+xml", '<svg xmlns="http://www.w3.org/2000/svg" width="400" height="300"></svg>'],
  "/page.js": ["text/javascript", `
    const made = [], refused = [];
    document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
    addEventListener("load", () => {
      const style = () => ({ fill: "#ff0000", stroke: "#00ff00" });
      window.annotator = Annotorious.createImageAnnotator("image", { drawingMode: "click", style });
      annotator.setDrawingTool("polygon");
      annotator.on("createAnnotation", (annotation) => made.push(annotation.target.selector.geometry.points));
    });`],
};
const server = http.createServer((request, response) => {
  const { pathname, search } = new URL(request.url, "http://localhost");
  const [type, body] = files[pathname] ?? ["text/plain", ""];
  const policy = search ? { "content-security-policy": "default-src 'self'" } : {};
  response.writeHead(200, { "content-type": type, ...policy }).end(body);
});
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const corners = [[60, 60], [300, 60], [300, 220], [100, 200]];

async function open(browser, search, hasTouch) {
  const page = await browser.newPage({ hasTouch });
  await page.goto(`http://localhost:${server.address().port}/${search}`);
  await page.waitForFunction(() => window.annotator);
  return page;
}

/** The corners of the polygons made, and those of one still being drawn. */
async function draw(browser, pointer, slide, end) {
  const page = await open(browser, "", pointer === "touch");
  const box = await page.locator("#image").boundingBox();
  const session = await page.context().newCDPSession(page);
  async function tap([left, top], hold = 60) {
    const [x, y] = [box.x + left, box.y + top];
    if (pointer === "mouse") return page.mouse.click(x, y);
    const touch = (type, ...touchPoints) => session.send("Input.dispatchTouchEvent", { type, touchPoints });
    await touch("touchStart", { x, y });
    if (slide) await touch("touchMove", { x: x + slide, y });
    await pause(hold);
    await touch("touchEnd");
  }
  for (const corner of corners) {
    await tap(corner);
    await pause(400);
  }
  if (pointer === "mouse") await page.mouse.dblclick(box.x + corners[3][0], box.y + corners[3][1]);
  else if (end === "long press") await tap(corners[3], 2500);
  else if (end === "first corner") await tap(corners[0]);
  else for (let i = 0; i < 2; i++) await tap(corners[3]);
  await pause(400);
  const [done, begun] = await page.evaluate(() => {
    const polygon = document.querySelector(".a9s-rubberband .a9s-inner");
    return [made.map((points) => points.map((corner) => corner.map(Math.round))), polygon?.getAttribute("points")];
  });
  await page.context().close();
  console.log(pointer, `slides ${slide} px, ${end}: made ${JSON.stringify(done)} begun ${begun ?? "-"}`);
  return [done, begun];
}

async function main() {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium" });
  const version = JSON.parse(fs.readFileSync(folder + "package.json")).version;
  console.log("annotorious", version, "chromium", browser.version());
  assert.equal((await draw(browser, "mouse", 0, "double click"))[0].length, 1);
  for (const end of ["double tap", "first corner", "long press"]) {
    const [made, begun] = await draw(browser, "touch", 0, end);
    assert.deepEqual([made.length, begun], [0, "60,60 60,60"]);
    assert.equal((await draw(browser, "touch", 2, end))[0].length, 1);
  }
  const fills = [];
  for (const search of ["", "?policy"]) {
    const page = await open(browser, search, false);
    await page.evaluate(() => {
      const bounds = { minX: 50, minY: 50, maxX: 150, maxY: 120 };
      const selector = { type: "RECTANGLE", geometry: { bounds, x: 50, y: 50, w: 100, h: 70 } };
      annotator.addAnnotation({ id: "a", bodies: [], target: { annotation: "a", selector } });
    });
    const region = page.locator(".a9s-annotation .a9s-inner");
    await region.waitFor();
    const [fill, attribute] = await region.evaluate((e) => [getComputedStyle(e).fill, e.getAttribute("style")]);
    const refused = await page.evaluate(() => refused);
    const name = search ? "default-src 'self'" : "no policy";
    console.log(`${name}: style ${attribute.split(";")[0]}, seen ${fill}, refused ${refused.join(" ") || "-"}`);
    fills.push([fill, refused.length]);
  }
  assert.deepEqual(fills, [["rgb(255, 0, 0)", 0], ["rgba(255, 255, 255, 0.15)", 2]]);
  await browser.close();
}
server.listen(0, "localhost", async () => {
  await main();
  process.exit(0);
});
JS
node surprises.cjs
