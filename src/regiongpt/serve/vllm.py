"""The language model in vLLM, which writes the answers to questions that our own parts embed.

They are embedded whole: vLLM's prefix cache takes some prompts of text and embeddings for one another.
"""

import atexit
import itertools
import logging
import os
import signal
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from regiongpt.errors import ConfigError
from regiongpt.inference.engine import Engine, Prompt, Scene
from regiongpt.inference.options import Options
from regiongpt.inference.scheduler import Job, Scheduler
from regiongpt.serve.options import ServeOptions
from regiongpt.storage import digest, locked, new_folder, reason, sha256, weights_digest

log = logging.getLogger(__name__)
MEMORY = 0.9
"""Share of the free GPU memory that vLLM takes; the rest is for encoding images and scoring choices."""


class VllmEngine(Engine):
    """A model whose answers vLLM writes, or ConfigError; it scores closed sets itself, and so keeps its own weights."""

    def __init__(self, engine: Engine, checkpoint: Path, options: ServeOptions) -> None:
        super().__init__(engine.model, engine.processor, rows=options.rows)
        llm = _start(export(engine.model, checkpoint), engine.model, options)
        self.scheduler = VllmScheduler(self.scheduler, llm)

    def job(self, scene: Scene, prompt: Prompt, options: Options, streams: bool = False) -> Job:
        """A prompt as the scheduler takes it, with its image: vLLM finds again what it has read before."""
        embeds_TD = self.embed(scene, prompt.ids, prompt.rows, prompt.pooled)
        reader = self.reader(prompt, options) if streams or options.stop else None
        return Job(prefix=None, embeds=embeds_TD, options=options, room=prompt.room, reader=reader)


class VllmScheduler(Scheduler):
    """Hands jobs to vLLM, and takes their tokens as they come."""

    def __init__(self, own: Scheduler, llm: Any) -> None:
        super().__init__(own.decoder, own._embed, sorted(own._stop_ids), own._never, rows=own.rows)
        self.llm = llm
        self.reused = 0  # tokens of questions that vLLM had read before
        self._numbers = itertools.count()
        self._jobs: dict[str, Job] = {}

    @property
    def dead(self) -> bool:
        """Whether vLLM's own process has ended."""
        return bool(self.llm.engine_core.resources.engine_dead)

    def submit(self, job: Job) -> None:
        """Have an answer written by the next calls of :meth:`advance`."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        options = job.options
        params = SamplingParams(
            max_tokens=job.room,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            stop_token_ids=sorted(self._stop_ids),
            logit_bias=dict.fromkeys(self._never, float("-inf")),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        name = str(next(self._numbers))
        with self._lock:
            self.llm.add_request(name, {"type": "embeds", "prompt_embeds": job.embeds.cpu()}, params)
            self._jobs[name] = job
            self.running.append(job)

    def _step(self) -> None:
        self._drop_cancelled()
        # Waits for vLLM's next token, whoever it is for.
        for output in self.llm.step() if self.running else ():
            job, written = self._jobs[output.request_id], output.outputs[0]
            if not job.admitted:
                job.admitted, self.reused = True, self.reused + (output.num_cached_tokens or 0)
            for token in written.token_ids:
                job.tokens.append(token)
                if job.reader is not None and token not in self._stop_ids:
                    job.reader.read(token)
                    if job.reader.stopped:
                        break
            if written.finish_reason not in (None, "stop", "length"):
                job.error = RuntimeError(f"vLLM ended an answer: {written.finish_reason}")
            if output.finished or (job.reader is not None and job.reader.stopped):
                self._leave(self.running.index(job))

    def _abandon(self) -> None:
        names, self._jobs, self.running = list(self._jobs), {}, []
        if not self.dead:
            self.llm.abort_request(names)

    def _leave(self, row: int) -> None:
        name = list(self._jobs)[row]  # they are in the same order
        job, _ = self._jobs.pop(name), self.running.pop(row)
        self.llm.abort_request([name])  # nothing, where it has ended by itself
        if job.reader is not None:
            job.reader.read(final=True)
        job.finished = True


def export(model: Any, checkpoint: Path) -> Path:
    """A checkpoint's language model as vLLM loads it, in a folder written the first time for its content."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regiongpt"
    folder = home / f"vllm-{digest(sha256(checkpoint / 'config.json'), weights_digest(checkpoint), str(model.dtype))}"
    with locked(home, wait=True):
        if not folder.is_dir():
            with new_folder(folder) as new:
                model.language_model.save_pretrained(new, max_shard_size="2GB")
            log.info("the language model for vLLM is in %s", folder)
    return folder


def _start(folder: Path, model: Any, options: ServeOptions) -> Any:
    # It tells nobody that it runs, and does not fork: this process has threads.
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.update({**quiet, "VLLM_WORKER_MULTIPROC_METHOD": "spawn", **os.environ})
    free, total = torch.cuda.mem_get_info(model.device) if model.device.type == "cuda" else (1, 1)
    # vLLM's processes inherit it: Ctrl-C is for this one, which lets them finish what runs.
    resource_tracker.ensure_running()  # or else it is begun with them, and unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        from vllm import EngineArgs, LLMEngine

        arguments = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype=str(model.dtype).removeprefix("torch."),
            enable_prompt_embeds=True,
            enable_prefix_caching=True,
            tensor_parallel_size=options.tensor_parallel,
            max_num_seqs=options.rows,
            disable_log_stats=True,
            gpu_memory_utilization=MEMORY * free / total,
        )
        llm = LLMEngine.from_engine_args(arguments)
    except Exception as error:
        raise ConfigError(f"--engine vllm: vLLM does not start with {folder}: {reason(error)}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(llm.engine_core.shutdown)  # before multiprocessing ends what it began
    return llm
