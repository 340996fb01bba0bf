"""What many regions of one image cost: the peers' way, one batch with the prefix copied, and the shared prefix.

    python benchmarks/many_regions.py --out many_regions.json --plot docs/images/many_regions.png

Every way is timed in this one run, on the model of the package and on a random one of CLIP-B/16 and a Llama of 160M
parameters; ``--models`` also takes ones of 1B and 7B, for a GPU. All answers have the same number of tokens, for the
end of an answer is not allowed before. The peers' way encodes the image for every region and answers it alone; since
its cost is the same for each, ``--alone`` of them are run and multiplied. The batch with the prefix copied shares what
goes to the end of the image, as this package's way does without the copies. The limit is the time that reading the
weights and the arithmetic would take at the bandwidth and the rate that this machine shows for a large sum and a large
product of matrices.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from stamp import stamp
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipImageProcessorPil,
)

from regiongpt import Region, RegionGPTError, RegionPredictor
from regiongpt.environment import progress, progress_shown
from regiongpt.inference.choices import answer_scores
from regiongpt.inference.engine import Engine, pick_device, pick_dtype, question_turns
from regiongpt.inference.options import Options
from regiongpt.inference.scheduler import Scheduler
from regiongpt.model import weights
from regiongpt.model.modeling import CACHE
from regiongpt.prompts import COCO_80, question
from regiongpt.storage import finite, write_json

CLIP_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "image_size": 224, "patch_size": 16}  # fmt: skip
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "image_size": 336, "patch_size": 14}  # fmt: skip
RANDOM = {
    "clip-b-llama-160m": (CLIP_B, {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                                   "num_attention_heads": 12}),
    "clip-l-llama-1b": (CLIP_L, {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                                 "num_attention_heads": 32, "num_key_value_heads": 4}),
    "clip-l-llama-7b": (CLIP_L, {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                                 "num_attention_heads": 32}),
}  # fmt: skip
"""Shapes of untrained models: what is in a model does not change what it costs."""
MODELS = ("nano", *RANDOM)
WAYS = {
    "alone": "encode and ask each alone",
    "copied": "one batch, prefix copied",
    "shared": "one batch, prefix shared",
}


def configurations(name: str) -> tuple[CLIPVisionConfig, LlamaConfig]:
    """Sizes of tower and language model."""
    tower, language = RANDOM[name]
    fixed = {"vocab_size": 32000, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
    return CLIPVisionConfig(**tower), LlamaConfig(**language, **fixed, pad_token_id=0)


def random_model(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A CLIP tower and a Llama, untrained, with the tokenizer of the package."""
    torch.manual_seed(0)
    vision, language = folder / "vision", folder / "language"
    tower, llama = configurations(name)
    CLIPVisionModel(tower).save_pretrained(vision)
    side = {"height": tower.image_size, "width": tower.image_size}
    SiglipImageProcessorPil(size=side).save_pretrained(vision)
    AutoTokenizer.from_pretrained(weights.nano_path()).save_pretrained(language)
    with device:  # billions of random numbers take an accelerator seconds
        LlamaForCausalLM(llama).to(dtype).save_pretrained(language)
    return weights.create(vision, language, chat_template="vicuna_v1")


def photograph(seed: int = 0, size: int = 480) -> np.ndarray:
    """Noise: what is in an image does not change what it costs."""
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


def boxes(count: int, size: int = 480) -> list[Region]:
    """Different boxes of the image."""
    rng = np.random.default_rng(1)
    corners = rng.uniform([0, 0, 20, 20], [size - 120, size - 120, 120, 120], (count, 4))
    return [Region.box(x, y, x + w, y + h) for x, y, w, h in corners.tolist()]


class Bench:
    """One model, all ways.

    Args:
        engine: the model.
        tokens: new tokens of each answer.
    """

    def __init__(self, engine: Engine, tokens: int) -> None:
        self.engine, self.tokens, self.photo = engine, tokens, photograph()
        self.text = question("describe", regions=[1])
        self.cache_bytes = 0

    def alone(self, regions: Sequence[Region]) -> None:
        """The peers' way: the image encoded and read for every region."""
        engine = self.engine
        for region in regions:
            inputs = engine.processor.apply_chat_template(
                question_turns((), self.text), tokenize=True, return_dict=True, add_generation_prompt=True,
                images=[self.photo], regions=[region],
            ).to(engine.device)  # fmt: skip
            inputs["pixel_values"] = inputs["pixel_values"].to(engine.model.dtype)
            with torch.inference_mode():
                engine.model.generate(
                    **inputs, max_new_tokens=self.tokens, min_new_tokens=self.tokens, do_sample=False, pad_token_id=0
                )

    @torch.inference_mode()
    def copied(self, regions: Sequence[Region]) -> None:
        """The image encoded and read once, its keys and values copied for each sequence of a plain batch."""
        engine, language_model = self.engine, self.engine.model.language_model
        scene = engine.encode_image(Image.fromarray(self.photo))
        prompt = engine.encode_text(question_turns((), self.text), 1)
        ids, rows = prompt["input_ids"].tolist(), prompt["region_ids"].tolist()
        begin = len(ids) - ids[::-1].index(engine.model.config.image_token_id)
        embeds = torch.stack(
            [engine.embed(scene, ids, rows, features) for features in engine.pool_each(scene, regions)]
        )
        cache = DynamicCache()
        language_model(inputs_embeds=embeds[:1, :begin], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(regions))
        ahead = embeds[:, begin:]
        for _ in range(self.tokens):
            logits = language_model(inputs_embeds=ahead, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
            ahead = engine.model.get_input_embeddings()(logits[:, -1].argmax(-1))[:, None]
        self.cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def shared(self, regions: Sequence[Region]) -> None:
        """This package's way."""
        engine = self.engine
        scene = engine.encode_image(Image.fromarray(self.photo))
        features = engine.pool_each(scene, regions)
        prompt = engine.prompt(question_turns((), self.text), features[0], 1, self.tokens)
        prompt = replace(prompt, repeated=len(regions) > 1)
        scheduler = Scheduler(engine.decoder, engine.model.get_input_embeddings(), [], [], None, len(regions))
        options = Options(max_new_tokens=self.tokens)
        jobs = (engine.job(scene, replace(prompt, pooled=each), options) for each in features)
        with self._watched(engine):
            written = [len(job.tokens) for job in scheduler.run(jobs)]
        assert written == [self.tokens] * len(regions), written
        self.cache_bytes += sum(prefix.nbytes for prefix in scene.prefixes.kept.values())

    @contextmanager
    def _watched(self, engine: Engine) -> Iterator[None]:
        """Note how large the sequences' own keys and values become."""
        forward, self.cache_bytes = engine.decoder.forward, 0

        def watched(cache: Any, *args: Any, **kwargs: Any) -> Any:
            logits = forward(cache, *args, **kwargs)
            own = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            self.cache_bytes = max(self.cache_bytes, own)
            return logits

        engine.decoder.forward = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            del engine.decoder.forward  # the class's own again

    def limit(self, regions: int, machine: dict[str, float]) -> dict[str, float]:
        """The least seconds of all answers' steps, and of reading their prompts, on this machine."""
        model = self.engine.model.language_model
        embedding = self.engine.model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is embedding
        read = sum(each.nbytes for each in model.parameters()) - (0 if tied else embedding.nbytes)
        products = read / embedding.element_size()
        prompt = self.engine.encode_text(question_turns((), self.text), 1)["input_ids"].tolist()
        begin = len(prompt) - prompt[::-1].index(self.engine.model.config.image_token_id)
        if regions > 1:  # they share the question up to the region
            begin = prompt.index(self.engine.model.config.region_token_id)
        step = max(read / machine["bytes_per_second"], 2 * products * regions / machine["flops"])
        first = 2 * products * (begin + regions * (len(prompt) - begin)) / machine["flops"]
        return {"step": step, "prompts": first, "all": first + (self.tokens - 1) * step, "bytes_read_per_step": read}


def measure_machine(device: torch.device, dtype: torch.dtype, clock: str) -> dict[str, float]:
    """Bytes read a second by a large sum, and operations a second of a large product, the best of several each."""
    numbers = torch.ones(64 * 2**20, device=device, dtype=dtype)
    square = torch.randn((1024, 1024), device=device, dtype=dtype)
    summing = min(timed(numbers.sum, device, clock) for _ in range(3))
    product = min(timed(lambda: square @ square, device, clock) for _ in range(5))
    return {"bytes_per_second": numbers.nbytes / summing, "flops": 2 * 1024**3 / product}


CLOCK = {"cpu": time.process_time, "wall": time.perf_counter}
"""CPU seconds, in one thread, for a machine that does other work too."""


def timed(work: Callable[[], Any], device: torch.device, clock: str = "wall") -> float:
    began = CLOCK[clock]()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCK[clock]() - began


def generation(bench: Bench, dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of each way at each number of regions.

    What else runs on the machine changes from minute to minute, so the ways take turns, the machine's own limits are
    measured between them; given are the means over the rounds and their deviations. A share of the limit above 1 still
    says that the machine was busier while the limits were measured: such a row is not to be trusted.
    """
    device, counts, clock, rows = bench.engine.device, options.regions, options.clock, []
    bench.shared(boxes(2))  # once unmeasured
    for count in progress(counts, "answers", "numbers of regions"):
        row: dict[str, Any] = {"regions": count, "cache_bytes": {}}
        rounds: list[dict[str, float]] = []
        machines = []
        for _ in range(options.rounds):
            machines.append(measure_machine(device, dtype, clock))
            some = min(options.alone, count)
            found = {"alone": timed(partial(bench.alone, boxes(some)), device, clock) * count / some}
            for way in ("copied", "shared"):
                found[way] = timed(partial(getattr(bench, way), boxes(count)), device, clock)
                row["cache_bytes"][way] = bench.cache_bytes
            found["encode"] = timed(partial(bench.engine.encode_image, Image.fromarray(bench.photo)), device, clock)
            rounds.append(found)
        machines.append(measure_machine(device, dtype, clock))
        row["machine"] = {key: max(machine[key] for machine in machines) for key in machines[0]}
        row["rounds"] = rounds
        row["seconds"], row["deviation"] = (
            {way: number([found[way] for found in rounds]) for way in rounds[0]}
            for number in (statistics.mean, statistics.pstdev)
        )
        row["times_faster"] = {way: row["seconds"][way] / row["seconds"]["shared"] for way in ("alone", "copied")}
        row["tokens_per_second"] = count * bench.tokens / row["seconds"]["shared"]
        row["limit"] = bench.limit(count, row["machine"])
        row["share_of_limit"] = row["limit"]["all"] / (row["seconds"]["shared"] - row["seconds"]["encode"])
        rows.append(row)
    return rows


def choices(engine: Engine, regions: int) -> dict[str, Any]:
    """Seconds of scoring 80 names for some regions of an image, encoding included."""
    bench, turns = Bench(engine, 1), question_turns((), question("classify", regions=[1]))

    def scored() -> None:
        fresh = engine.encode_image(Image.fromarray(bench.photo))
        answer_scores(engine, fresh, turns, engine.pool_each(fresh, boxes(regions)), COCO_80)

    scored()  # once unmeasured; the names are then ready, as they are for every image but the first
    seconds = min(timed(scored, engine.device) for _ in range(2))
    return {"regions": regions, "names": len(COCO_80), "seconds": seconds}


def peak_memory(count: int) -> int:
    """Bytes that a process holds at most that describes ``count`` regions of an image by ``nano``."""
    work = f"predictor.set_image(photograph()).describe(boxes({count}), brief=True, max_new_tokens=2)"
    text = f"""import resource
from many_regions import RegionPredictor, boxes, photograph
predictor = RegionPredictor.from_pretrained()
{work}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"""
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout)


def plot(results: dict[str, Any], path: Path) -> None:
    """Seconds and cache memory over the number of regions, one column a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(results), figsize=(5.2 * len(results), 7), squeeze=False)
    for column, (name, found) in enumerate(results.items()):
        rows = found["generation"]
        counts = [row["regions"] for row in rows]
        above, below = axes[0][column], axes[1][column]
        for number, (way, label) in enumerate(WAYS.items()):
            look = {"marker": "o", "color": f"C{number}", "label": label}
            above.plot(counts, [row["seconds"][way] for row in rows], **look)
            if way != "alone":
                below.plot(counts, [row["cache_bytes"][way] / 1e6 for row in rows], **look)
        above.plot(counts, [row["limit"]["all"] for row in rows], "k:", label="limit of the machine")
        above.set(title=name, xscale="log", yscale="log", ylabel=f"seconds, {found['tokens']} tokens a region")
        below.set(xscale="log", xlabel="regions of one image", ylabel="MB of keys and values")
        for axis in (above, below):
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(results: dict[str, Any]) -> str:
    lines = []
    for name, found in results.items():
        lines.append(f"{name}: {found['tokens']} new tokens a region")
        lines.append(f"  {'regions':>8}{'alone s':>12}{'copied s':>12}{'shared s':>12}{'x alone':>9}{'x copied':>9}"
                     f"{'tok/s':>9}{'of limit':>9}{'MB copied':>11}{'MB shared':>11}{'GB/s':>7}"
                     f"{'GFLOP/s':>9}")  # fmt: skip
        for row in found["generation"]:
            seconds, memory = row["seconds"], row["cache_bytes"]
            machine = row["machine"]
            spread = {way: f"{seconds[way]:.2f}±{row['deviation'][way]:.2f}" for way in WAYS}
            lines.append(
                f"  {row['regions']:>8}{spread['alone']:>12}{spread['copied']:>12}{spread['shared']:>12}"
                f"{row['times_faster']['alone']:>9.1f}{row['times_faster']['copied']:>9.2f}"
                f"{row['tokens_per_second']:>9.0f}{row['share_of_limit']:>9.0%}"
                f"{memory['copied'] / 1e6:>11.1f}{memory['shared'] / 1e6:>11.1f}"
                f"{machine['bytes_per_second'] / 1e9:>7.1f}{machine['flops'] / 1e9:>9.0f}"
            )
        if "choices" in found:
            scored = found["choices"]
            lines.append(f"  {scored['names']} choices x {scored['regions']} regions: {scored['seconds']:.2f} s")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, draw and write.

    Raises:
        RegionGPTError: the model or an option is wrong.
    """
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    results: dict[str, Any] = {}
    peaks = {count: peak_memory(count) for count in options.memory}
    if options.clock == "cpu":
        torch.set_num_threads(1)
    for name in options.models:
        print(f"{name} ...", file=sys.stderr)
        if name == "nano":
            model, processor = weights.load()
        else:
            with tempfile.TemporaryDirectory() as folder:
                model, processor = random_model(name, Path(folder), device, dtype)
        engine = RegionPredictor(model.to(device, dtype), processor).engine
        bench = Bench(engine, options.tokens)
        with progress_shown():
            rows = generation(bench, dtype, options)
        found: dict[str, Any] = {"tokens": options.tokens, "generation": rows}
        if options.choice_regions:
            found["choices"] = choices(engine, options.choice_regions)
        results[name] = found
    report = {
        "benchmark": "many_regions",
        "results": results,
        "peak_memory_bytes": peaks,
        **stamp(vars(options), {"model": weights.nano_path()}),
    }
    print(table(results))
    for count, peak in peaks.items():
        print(
            f"describing {count} regions: at most {peak / 2**20:.0f} MiB, {peak / min(peaks.values()):.2f}x the least"
        )
    if options.plot:
        plot(results, options.plot)
    if options.out:
        write_json(options.out, finite(report))
    return report


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS[:2]))
    parser.add_argument("--regions", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="new tokens of each answer (default: 32)")
    parser.add_argument("--alone", type=int, default=4, metavar="N", help="regions really asked alone (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of each (default: 5)")
    parser.add_argument("--clock", choices=CLOCK, default="wall", help="cpu: CPU seconds of one thread")
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[], metavar="N", help="peak memory of describing N regions, each apart"
    )
    parser.add_argument(
        "--choice-regions", type=int, default=32, metavar="N", help="regions to classify; 0: not at all"
    )
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on the CPU, else bfloat16)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them over the number of regions (matplotlib)")
    options = parser.parse_args(argv)
    options.regions = sorted(set(options.regions))
    for name in ("tokens", "alone"):
        if getattr(options, name) < 1:
            parser.error(f"expected --{name} of at least 1, got {getattr(options, name)}")
    if options.regions[0] < 1:
        parser.error(f"expected --regions of at least 1, got {options.regions[0]}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse(argv))
    except RegionGPTError as error:
        print(f"many_regions: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
