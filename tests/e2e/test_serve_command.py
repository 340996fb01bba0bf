"""`regiongpt serve` as a process: it starts, finishes what runs when it is told to end, and refuses what comes."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from asking import photograph
from PIL import Image
from serving import chat_body, data_uri, serving, wait_for
from tiny_checkpoint import make_checkpoint

from regiongpt import RegionPredictor, cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), context=8192)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_is_finished_and_what_comes_is_refused(checkpoint: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "regiongpt.cli", "serve", "--port", "0", "--model", str(checkpoint)]
    options = ["--max-tokens", "6000", "--device", "cpu"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+/", process.stdout.readline())
        assert found
        address = found[0]
        # A temperature at which a random model does not come to an end by itself.
        body = chat_body(image=data_uri(photograph()), max_tokens=1500, temperature=2, seed=3, stream=True)
        with httpx.stream("POST", f"{address}v1/chat/completions", json=body, timeout=120) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(how)

            def refused() -> bool:
                try:
                    return httpx.get(f"{address}healthz").status_code == 503
                except httpx.TransportError:
                    return True

            wait_for(refused)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] in ("stop", "length")
        assert process.wait(60) == (0 if how == signal.SIGTERM else cli.EXIT_INTERRUPTED)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--host", "0.0.0.0"], "--api-keys"),
        (["--port", "70000"], "--port"),
        (["--max-regions", "0"], "--max-regions"),
        (["--engine", "vllm"], "regiongpt[vllm]"),
        (["--engine", "vllm", "--token-budget", "9000"], "--token-budget"),
        (["--tensor-parallel", "2"], "--engine vllm"),
        (["--api-keys", "missing"], "missing"),
        (["--model", "missing"], "missing"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], wrong: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["serve", *words]) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert wrong in error
    assert error.count("\n") == 1


def test_the_documented_program_works(checkpoint: Path, tmp_path, monkeypatch, capsys) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Image.fromarray(np.zeros((300, 320, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    with serving(RegionPredictor.from_pretrained(checkpoint, device="cpu").engine) as running:
        exec(program.replace("http://127.0.0.1:8642/", running.address).replace("regiongpt-nano", "tiny"), {})
    assert capsys.readouterr().out.strip()


def test_deployment_files_name_real_options() -> None:
    parser_help = subprocess.run(
        [sys.executable, "-m", "regiongpt.cli", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    root = Path(__file__).parents[2]
    for file in ("deploy/Containerfile", "deploy/regiongpt.service", "docs/serve.md"):
        text = (root / file).read_text(encoding="utf-8")
        commands = re.findall(r'regiongpt"?,? "?serve\b(.*)', text)
        assert commands, file
        for option in re.findall(r"--[a-z-]+", " ".join(commands)):
            assert option in parser_help, (file, option)
