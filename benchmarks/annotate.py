"""What the caption engine stands and costs: kills, faults, rate, processor time, memory, and batches.

    python benchmarks/annotate.py kills --out kills.json

Endpoints are mock ones on this machine (tests/endpoint.py), each in a process of its own, so that figures are about
this side of the line. Images are noise.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from stamp import stamp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from endpoint import Running, running

from regiongpt.storage import write_json


def draw(root: Path, images: int, regions: int, size: tuple[int, int] = (320, 240)) -> Path:
    """Images of smooth noise with boxes of ten classes, in COCO's format."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    entries, boxes = [], []
    for k in range(images):
        small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        small.resize(size).save(root / "images" / f"{k}.jpg", quality=85)
        entries.append({"id": k, "file_name": f"{k}.jpg", "width": size[0], "height": size[1]})
        corners = rng.uniform((0, 0, 20, 20), (size[0] - 120, size[1] - 120, 120, 120), (regions, 4))
        for n, box in enumerate(corners.tolist()):
            boxes.append({"id": len(boxes) + 1, "image_id": k, "category_id": n % 10, "bbox": box, "iscrowd": 0})
    categories = [{"id": n, "name": f"class {n}"} for n in range(10)]
    file = root / "instances.json"
    file.write_text(json.dumps({"images": entries, "annotations": boxes, "categories": categories}))
    return root


def start(root: Path, out: Path, *more: object) -> "subprocess.Popen[str]":
    paths = ["--images", root / "images", "--regions", root / "instances.json", "--out", out, "--gallery", 0]
    command = [sys.executable, "-m", "regiongpt.cli", "annotate", *map(str, (*paths, *more))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def captioned(out: Path) -> int:
    """Different regions in the table of all captions."""
    import pyarrow.parquet as pq

    ids: list[str] = []
    for file in (out / "captions").glob("*.parquet"):
        ids += pq.read_table(file, columns=["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids)), "a region is there twice"
    return len(ids)


def finish(process: "subprocess.Popen[str]") -> None:
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {err or out}")


def lines(endpoint: Running, what: str) -> int:
    log = endpoint.folder / "log.txt"
    return int(subprocess.run(["grep", "-c", f"^{what}", log], capture_output=True, text=True).stdout or 0)


def kills(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL at random: every region once, and nothing finished asked again."""
    images = options.regions // 10
    root, out, slots, rng = draw(folder / "data", images, 10), folder / "out", 64, random.Random(0)
    killed = 0
    with running(folder / "endpoint", parse=False, latency=0.05, slots=slots) as served:
        while True:
            process = start(root, out, "--captioner", served.url, "--concurrency", slots)
            left = max(0, images * 11 - lines(served, "done"))
            target = (images * 11 - left) + rng.uniform(0.2, 1.8) * left / max(1, options.kills - killed + 1)
            while process.poll() is None and (killed >= options.kills or lines(served, "done") < target):
                time.sleep(0.05)
            if process.poll() is not None:
                finish(process)
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
        asked, done = served.asked(), served.done()
    repeated = asked.total() - len(asked)
    return {
        "regions": options.regions, "kills": killed, "captioned": captioned(out), "requests": len(asked),
        "answered": len(done), "asked_again": repeated, "at_most_under_way": killed * slots,
        "most_for_one_kill": repeated / max(killed, 1),
    }  # fmt: skip


def faults(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The endpoint down for a minute, and one malformed answer in twenty."""
    root, found = draw(folder / "data", 200, 10), {}
    with running(folder / "endpoint", parse=False, latency=0.05, slots=64, malformed=0.05) as served:
        began = time.perf_counter()
        finish(start(root, folder / "malformed", "--captioner", served.url))
        found["malformed"] = {
            "captioned": captioned(folder / "malformed"), "asked": served.asked().total(),
            "seconds": time.perf_counter() - began,
        }  # fmt: skip
    with running(folder / "endpoint2", parse=False, latency=0.05, slots=64) as served:
        process = start(root, folder / "down", "--captioner", served.url)
        while lines(served, "done") < 500:
            time.sleep(0.05)
        served.set(down="cut")
        time.sleep(options.down)
        served.set(latency=0.05)
        back, before = time.perf_counter(), lines(served, "done")
        while lines(served, "done") == before:
            time.sleep(0.05)
        first = time.perf_counter() - back
        finish(process)
        found["down"] = {
            "seconds": options.down, "captioned": captioned(folder / "down"),
            "asked_again": served.asked().total() - 2200, "seconds_until_the_first_answer": first,
        }  # fmt: skip
    return found


def rate(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Requests a second beside what 64 slots allow."""
    requests, marks = _marks(folder, options)
    (a, _, first), (b, _, last) = marks
    per_second, ideal = (last - first) / (b - a), 64 / options.latency
    return {
        "requests": requests, "ideal_per_second": ideal, "per_second": per_second, "share_of_ideal": per_second / ideal,
        "load_average": os.getloadavg(),
    }  # fmt: skip


def cpu(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Processor time a request, with crops and store, beside a bare loop of the client."""
    requests, ((_, cpu_a, first), (_, cpu_b, last)) = _marks(folder, options)
    own = 1e3 * (cpu_b - cpu_a) / (last - first)
    bare = {}
    with running(folder / "bare", parse=False, latency=options.latency, slots=64) as served:
        for name in ("httpx", "aiohttp"):
            code = f"import annotate; annotate.bare({served.url!r}, {requests // 2}, 64, {name!r})"
            ran = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
            )
            bare[name] = json.loads(ran.stdout)
    times = {f"times_{name}": own / found["cpu_ms_per_request"] for name, found in bare.items()}
    return {"requests": requests, "cpu_ms_per_request": own, "bare_client": bare, **times}


def _marks(folder: Path, options: argparse.Namespace) -> tuple[int, list[tuple[float, float, int]]]:
    """Time, processor time and answers of a run, after the first tenth of its requests and before the last."""
    images = options.rate_regions // 10
    root, marks, requests = draw(folder / "data", images, 10), [], images * 11
    with running(folder / "endpoint", parse=False, latency=options.latency, slots=64) as served:
        process = start(root, folder / "out", "--captioner", served.url, "--concurrency", 256)
        while process.poll() is None:
            marks.append((time.perf_counter(), cpu_seconds(process.pid), lines(served, "done")))
            time.sleep(0.25)
        finish(process)
    inside = [mark for mark in marks if 0.1 * requests < mark[2] < 0.9 * requests]
    return requests, [inside[0], inside[-1]]


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, in user and system mode."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bare(url: str, requests: int, slots: int, transport: str) -> None:
    """A loop that only asks: the same payload each time, nothing read, cut out or kept."""
    import base64

    import openai

    picture = "data:image/jpeg;base64," + base64.b64encode(os.urandom(6000)).decode()

    async def loop() -> None:
        http = openai.DefaultAioHttpClient() if transport == "aiohttp" else None
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0, http_client=http) as client:
            numbers = iter(range(requests))

            async def worker() -> None:
                for number in numbers:
                    content: Any = [
                        {"type": "text", "text": f"In the context of the entire image, a thing {number},"},
                        {"type": "image_url", "image_url": {"url": picture}},
                        {"type": "text", "text": "describe the class in the close-up region in detail."},
                    ]
                    await client.chat.completions.create(
                        model="mock-vlm", messages=[{"role": "user", "content": content}], max_tokens=512
                    )

            await asyncio.gather(*(worker() for _ in range(slots)))

    began, cpu = time.perf_counter(), time.process_time()
    asyncio.run(loop())
    print(json.dumps({"cpu_ms_per_request": 1e3 * (time.process_time() - cpu) / requests,
                      "per_second": requests / (time.perf_counter() - began)}))  # fmt: skip


def memory(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Resident memory of a run over many regions: the last quarter beside the second."""
    images = options.memory_regions // 100
    root, out, total = draw(folder / "data", images, 100), folder / "out", images * 101
    samples: list[tuple[int, float]] = []
    began = time.perf_counter()
    with running(folder / "endpoint", parse=False, latency=0.0, slots=64) as served:
        process = start(root, out, "--captioner", served.url)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/statm").read_text().split()
            done = lines(served, "done")
            if len(status) > 1 and done < total:  # writing the files comes after
                samples.append((done, int(status[1]) * resource.getpagesize() / 1e6))
            time.sleep(1)
        finish(process)
    quarters = [[mb for done, mb in samples if q * total / 4 <= done < (q + 1) * total / 4] for q in range(4)]
    means = [float(np.mean(quarter)) for quarter in quarters]
    return {
        "regions": options.memory_regions, "captioned": captioned(out), "seconds": time.perf_counter() - began,
        "mb_by_quarter": means, "last_over_second": means[3] / means[1], "most_mb": max(mb for _, mb in samples),
    }  # fmt: skip


def regiongpt(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The captioner of RegionGPT checkpoints beside asking region by region: same model, prompts and answers."""
    import transformers

    from regiongpt import RegionPredictor
    from regiongpt.annotate.captioners import Request, make_captioner
    from regiongpt.annotate.captioners.checkpoint import region_question
    from regiongpt.annotate.options import Options
    from regiongpt.annotate.plan import context
    from regiongpt.annotate.plan import draw as drawn
    from regiongpt.data.sources import AnnotatedImages

    root = draw(folder / "data", options.batch_images, 16)
    captioner: Any = make_captioner(Options(captioner=options.model, images=root, regions=root, out=root))
    alone = RegionPredictor.from_pretrained(options.model, images=0)
    transformers.utils.logging.disable_progress_bar()
    took = {"together": 0.0, "alone": 0.0}
    same: list[bool] = []
    for number, item in enumerate(AnnotatedImages(root / "images", root / "instances.json")):
        photo = Image.open(root / "images" / item.image).convert("RGB")
        asks = [
            Request(stage="region", text="", picture=photo, regions=item.regions, number=k, category=each.category,
                    lead=context("A photo of some things."), version=drawn(0, f"{item.image} {k}", 10))
            for k, each in enumerate(item.regions)
        ]  # fmt: skip
        began = time.perf_counter()
        together = captioner.answer(asks)
        middle = time.perf_counter()
        texts = []
        for ask in asks:  # as peers do: the image is encoded anew for each region
            text, regions = region_question(ask)
            texts.append(alone.set_image(photo).ask(text, regions, max_new_tokens=512).text.strip())
        if number:  # the first is a warm-up
            took["together"] += middle - began
            took["alone"] += time.perf_counter() - middle
            same += [reply.text == text for reply, text in zip(together, texts, strict=True)]
    regions = 16 * (options.batch_images - 1)
    return {
        "regions": regions, "per_second": {name: regions / seconds for name, seconds in took.items()},
        "times": took["alone"] / took["together"], "same_answers": sum(same) / len(same),
    }  # fmt: skip


PARTS = {part.__name__: part for part in (kills, faults, rate, cpu, memory, regiongpt)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="part", required=True, metavar="PART")
    parts = {name: verbs.add_parser(name, help=part.__doc__, description=part.__doc__) for name, part in PARTS.items()}
    parts["kills"].add_argument("--regions", type=int, default=20_000)
    parts["kills"].add_argument("--kills", type=int, default=50)
    parts["faults"].add_argument("--down", type=float, default=60.0, help="seconds that the endpoint is down")
    for name in ("rate", "cpu"):
        parts[name].add_argument("--rate-regions", type=int, default=20_000)
        parts[name].add_argument("--latency", type=float, default=0.2, help="seconds of an answer")
    parts["memory"].add_argument("--memory-regions", type=int, default=200_000)
    parts["regiongpt"].add_argument("--batch-images", type=int, default=6)
    parts["regiongpt"].add_argument("--model", help="RegionGPT checkpoint (default: the model of the package)")
    for part in parts.values():
        part.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = PARTS[options.part](Path(folder), options)
    print(json.dumps(found, indent=1))
    if options.out:
        write_json(options.out, {"stamp": stamp(vars(options), {}), options.part: found})


if __name__ == "__main__":
    main()
