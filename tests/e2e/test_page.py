"""The page of ``regiongpt serve`` in a real browser, with nano behind it: by mouse, by keyboard alone and by touch."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from regiongpt import Region

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "src" / "regiongpt" / "serve" / "page"
CAT = PAGE / "examples" / "cat.jpg"
AXE = ROOT / ".ci" / "page" / "node_modules" / "axe-core" / "axe.min.js"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ALL = ["1 box", "2 polygon", "3 brush", "4 point"]
EVIL = "<img src=x onerror=alert(1)> <script>alert(2)</script>"
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}

playwright = pytest.importorskip("playwright.sync_api", reason="drives a browser: pip install playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="needs Chromium"),
    pytest.mark.skipif(not find_spec("fastapi"), reason="needs the extra `serve`"),
]


@pytest.fixture(scope="module")
def address():
    command = [sys.executable, "-m", "regiongpt.cli", "serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield next(filter(None, (re.search(r"http://\S+", line) for line in server.stdout)))[0]
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A person at the page."""

    def __init__(self, browser, address, viewport=WIDE, **options):
        self.context = browser.new_context(viewport=viewport, **options)
        self.page = self.context.new_page()
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        self.page.goto(address)
        playwright.expect(self.page.locator("#model")).not_to_be_empty()

    def open(self):
        self.page.set_input_files("#file", CAT)
        playwright.expect(self.page.locator("#canvas")).to_be_focused()

    def at(self, x, y):
        """A place on the screen, from fractions of the image."""
        box = self.page.locator("#canvas").bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def tool(self, name, press="click"):
        getattr(self.page.locator(f"label:has(#tool-{name})"), press)()

    def drag(self, *places):
        self.page.mouse.move(*self.at(*places[0]))
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*self.at(*place), steps=5)
        self.page.mouse.up()

    def click(self, *places):
        for place in places:
            self.page.mouse.click(*self.at(*place))

    def touch(self, *places):
        """One finger that goes down, along the places, and up."""
        driver = self.context.new_cdp_session(self.page)
        stops = np.array([self.at(*place) for place in places])
        path = [stops[:1], *(np.linspace(a, b, 9)[1:] for a, b in pairwise(stops))]
        for number, (x, y) in enumerate(np.concatenate(path).tolist()):
            event = {"type": "touchMove" if number else "touchStart", "touchPoints": [{"x": x, "y": y}]}
            driver.send("Input.dispatchTouchEvent", event)
        driver.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    @property
    def regions(self):
        return [re.sub(r"\s+", " ", text) for text in self.page.locator("#regions .name").all_inner_texts()]

    def ask(self, words="", mode="ask"):
        self.page.locator(f"[value={mode}]").check(force=True)
        if mode != "describe":
            self.page.fill("#text", words)
        self.page.click("#send")

    def answers(self):
        """Those of the conversation, once the last is whole."""
        self.page.wait_for_selector("#log .turn")
        self.page.wait_for_selector("#log:not([aria-busy])")
        assert not self.page.locator(".error").all_inner_texts()
        return self.page.locator(".answer > p").all_text_contents()

    def press(self, keys):
        for key in keys.split():
            key, _, times = key.partition("*")
            for _ in range(int(times or 1)):
                self.page.keyboard.press(key)

    def tab_to(self, selector, key="Tab"):
        for _ in range(40):
            self.page.keyboard.press(key)
            if self.page.evaluate("selector => document.activeElement?.matches(selector)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    def save(self, form, keys=""):
        if not keys:
            self.page.click("#save")
        with self.page.expect_download() as download:
            self.press(keys) if keys else self.page.click(f"#save-{form}")
        return json.loads(download.value.path().read_text())


@pytest.fixture
def visit(browser, address):
    visits = []

    yield lambda **options: visits.append(Visit(browser, address, **options)) or visits[-1]
    for each in visits:
        each.context.close()
        assert not [said for said in each.complaints if "the server responded with a status" not in said]


def test_the_first_paint_asks_nothing_of_others_and_says_what_to_do(visit, address):
    assert (PAGE / "konva.js").stat().st_size < 300_000
    assert "Permission is hereby granted" in (PAGE / "konva.LICENSE").read_text()
    seen = visit()
    assert all(request.url.startswith(address) for request in seen.requests)
    assert seen.page.locator("#choose").is_visible()
    assert seen.page.locator("#send").is_disabled()


def test_by_mouse_draw_ask_reload_and_take_away(visit, tmp_path):
    seen = visit()
    seen.open()
    seen.drag((0.05, 0.03), (0.85, 0.95))
    seen.tool("polygon")
    seen.click((0.65, 0.15), (0.72, 0.05), (0.85, 0.3), (0.65, 0.15))
    seen.tool("scribble")
    seen.drag((0.3, 0.6), (0.45, 0.8), (0.6, 0.7))
    seen.tool("point")
    seen.click((0.36, 0.4))
    assert seen.regions == ALL
    seen.tool("select")
    seen.page.fill("#text", "What is ")
    seen.click((0.2, 0.9))
    assert seen.page.input_value("#text") == "What is <region1>"
    seen.page.locator("#text").press("End")
    seen.page.evaluate("""() => { window.lengths = new Set(); new MutationObserver(() => lengths.add(
        document.querySelector('.answer').textContent.length)).observe(log, {childList: true, subtree: true}); }""")
    seen.page.keyboard.type("? Answer the question using COCO-80 category names.")
    seen.press("Enter")
    assert "cat" in seen.answers()[0]
    assert seen.page.evaluate("lengths.size") >= 2  # The empty answer, then what was streamed.
    seen.ask("Where is <region2>?")
    answers = seen.answers()
    assert len(answers) == 2
    asked = [request.post_data_json for request in seen.requests if request.url.endswith("/chat/completions")]
    assert [message["role"] for message in asked[1]["messages"]] == ["user", "assistant", "user"]
    assert sum(request.url.endswith("/v1/images") for request in seen.requests) == 1

    seen.page.reload()
    playwright.expect(seen.page.locator("#regions li")).to_have_count(4)
    assert seen.answers() == answers
    assert seen.page.locator("#image").evaluate("image => image.naturalWidth") == Image.open(CAT).width

    whole = seen.save("json")
    first = "What is <region1>? Answer the question using COCO-80 category names."
    assert [turn["question"] for turn in whole["conversation"]] == [first, "Where is <region2>?"]
    kinds = ("box", "polygon", "scribble", "point", "radius", "width")
    given = [Region.from_dict({key: row[key] for key in kinds if key in row}) for row in whole["regions"]]
    size = Image.open(CAT).size
    assert abs(given[0].bounds(*size) - np.array([0.05, 0.03, 0.85, 0.95]) * (size * 2)).max() < 1
    path = tmp_path / "regions.json"
    path.write_text(json.dumps(seen.save("coco")))
    coco = COCO(path)
    for region, note in zip(given[1:], coco.loadAnns([2, 3, 4]), strict=True):
        ours, theirs = region.to_mask(*size), coco.annToMask(note) > 0
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.9
        assert note["area"] == pytest.approx(ours.sum(), rel=0.1)


def test_regions_are_moved_reshaped_deleted_and_all_of_it_undone(visit):
    seen = visit()
    seen.open()
    seen.drag((0.2, 0.2), (0.4, 0.4))
    seen.tool("select")

    def box():
        shape = seen.save("json")["regions"][0]["box"]
        return (np.array(shape) / (Image.open(CAT).size * 2)).round(2).tolist()

    seen.drag((0.3, 0.3), (0.5, 0.4))
    assert box() == [0.4, 0.3, 0.6, 0.5]
    seen.drag((0.6, 0.5), (0.8, 0.9))
    assert box() == [0.4, 0.3, 0.8, 0.9]
    seen.drag((0.5, 0.5), (0.99, 0.99))  # It stays inside the image.
    assert box() == [0.6, 0.4, 1, 1]
    seen.page.click("#undo", click_count=2)
    assert box() == [0.4, 0.3, 0.6, 0.5]
    seen.page.click("#redo")
    assert box() == [0.4, 0.3, 0.8, 0.9]
    seen.page.click("#regions .bin")
    assert seen.regions == []
    seen.page.click("#undo")
    assert seen.regions == ["1 box"]


def test_by_keyboard_alone(visit):
    seen = visit()
    seen.tab_to("[data-example='cat.jpg']")
    seen.press("Enter")
    playwright.expect(seen.page.locator("#canvas")).to_be_focused()
    seen.press("Shift+ArrowLeft*8 Shift+ArrowUp*5 Enter Shift+ArrowRight*14 Shift+ArrowDown*11 Enter")
    assert "Region 1, box drawn" in seen.page.inner_text("#said")
    seen.press("p Enter Shift+ArrowLeft*3 Enter Shift+ArrowUp*3 Enter Enter")
    seen.press("r Enter ArrowLeft*9 ArrowUp*5 Enter o ArrowUp Enter")
    assert seen.regions == ALL
    seen.press("s 4 ArrowDown*3 Delete")
    assert seen.regions == ALL[:3]
    seen.press("Control+z*2")
    assert seen.regions == ALL
    seen.press("1 Enter")
    assert seen.page.input_value("#text") == "<region1>"
    seen.tab_to("#text")
    seen.press("Home W h a t Space i s Space End ? Enter")
    assert seen.answers()[0]
    seen.tab_to("#save", "Shift+Tab")
    assert len(seen.save("coco", "Enter Tab*2 Enter")["annotations"]) == 4


def test_by_touch_on_a_phone(visit):
    seen = visit(viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    seen.page.locator("[data-example='cat.jpg']").tap()
    playwright.expect(seen.page.locator("#canvas")).to_be_focused()
    seen.touch((0.05, 0.05), (0.85, 0.95))
    seen.tool("polygon", "tap")
    for place in ((0.65, 0.15), (0.72, 0.05), (0.85, 0.3), (0.65, 0.15)):
        seen.touch(place)
    seen.touch((0.2, 0.2), (0.4, 0.2), (0.4, 0.5), (0.2, 0.5))  # A polygon drawn in one go.
    seen.tool("scribble", "tap")
    seen.touch((0.3, 0.6), (0.45, 0.8), (0.6, 0.7))
    seen.tool("point", "tap")
    seen.touch((0.36, 0.4))
    assert seen.regions == ["1 box", "2 polygon", "3 polygon", "4 brush", "5 point"]
    seen.tool("select", "tap")
    seen.touch((0.1, 0.9), (0.12, 0.93))
    seen.touch((0.12, 0.9))
    assert seen.page.input_value("#text") == "<region1>"
    assert seen.page.evaluate("scrollY") == 0
    seen.page.locator("#send").tap()
    assert seen.answers()[0]
    assert seen.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_describe_classify_and_locate(visit):
    seen = visit()
    seen.open()
    seen.drag((0.05, 0.03), (0.85, 0.95))
    seen.drag((0.88, 0.02), (0.99, 0.2))
    seen.ask(mode="describe")
    assert all(seen.answers())
    seen.ask("cat, dog, horse", "classify")
    assert len(seen.answers()) == 4
    shares = [int(text.split()[0]) for text in seen.page.locator(".value").all_inner_texts() if "<" not in text]
    assert 195 <= sum(shares) <= 205
    seen.ask("the cat", "locate")
    assert re.search(r"Region \[\d\]|None of them", seen.answers()[-1])
    assert seen.page.locator(".turn").last.locator(".bars li").count() == 3


def test_an_answer_stays_text_and_its_regions_light_up(visit):
    seen = visit()
    pieces = [EVIL, " in Reg", "ion [1", "]."]
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [{"delta": {}}], "cited": [1], "warnings": [EVIL]})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    seen.page.route("**/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    seen.open()
    seen.drag((0.2, 0.2), (0.6, 0.7))
    seen.drag((0.7, 0.7), (0.9, 0.9))
    seen.ask(f"{EVIL} <region2>")
    assert seen.answers() == [f"{EVIL} in Region [2]."]
    asked = next(request.post_data_json for request in seen.requests if "/chat/" in request.url)
    assert len(asked["regions"]) == 1  # Only what is named is sent, as <region1>.
    assert asked["messages"][0]["content"][1]["text"] == f"{EVIL} <region1>"
    assert seen.page.locator("#log :is(img, script)").count() == 0
    shots = []
    for place in (".answer .reference", "#text"):
        seen.page.locator(place).hover()
        shots.append(seen.page.locator("#canvas").screenshot())
    assert shots[0] != shots[1]


def test_refusals_are_said_a_key_is_asked_for_and_a_forgotten_image_is_sent_again(visit):
    seen = visit()
    replies = [(404, "image_not_found"), (401, "invalid_api_key"), (429, "queue_full")]
    asked = []

    def answer(route):
        status, code = replies[len(asked)]
        asked.append(route.request.headers.get("authorization"))
        route.fulfill(status=status, body=json.dumps({"error": {"message": f"no: {code}", "code": code}}))

    seen.page.route("**/chat/completions", answer)
    seen.open()
    seen.ask("What is this?")
    seen.page.locator("#key").fill("secret")
    seen.page.keyboard.press("Enter")
    playwright.expect(seen.page.locator(".error")).to_have_text("no: queue_full")
    assert asked == [None, None, "Bearer secret"]
    assert sum(request.url.endswith("/v1/images") for request in seen.requests) == 2
    assert seen.page.input_value("#text") == "What is this?"


@pytest.mark.skipif(not AXE.exists(), reason="needs axe-core: make page")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing_serious(visit, viewport, scheme):
    seen = visit(viewport=viewport, color_scheme=scheme, bypass_csp=True)
    seen.page.add_script_tag(path=AXE)
    check = "async () => (await axe.run()).violations.filter(found => ['serious', 'critical'].includes(found.impact))"
    assert seen.page.evaluate(check) == []
    seen.open()
    seen.drag((0.2, 0.2), (0.6, 0.7))
    seen.ask("cat, dog, horse", "classify")
    seen.answers()
    assert seen.page.evaluate(check) == []
