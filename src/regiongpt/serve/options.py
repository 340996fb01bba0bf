"""Options of `regiongpt serve`, read without importing torch or FastAPI."""

import ipaddress
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from regiongpt.errors import ConfigError
from regiongpt.inference.options import ROWS, Detail
from regiongpt.settings import Settings
from regiongpt.storage import reason

KEYS = "REGIONGPT_API_KEYS"
"""Environment variable with API keys, separated by blanks."""


class Limits(Settings):
    """Limits of a request; exceeding one gives a 4xx status that names it."""

    max_bytes: int = Field(16 * 2**20, ge=1024)
    """bytes of a request or of an image"""
    max_values: int = Field(20_000, ge=1)
    """values in a request's JSON, such as the coordinates of its regions"""
    max_pixels: int = Field(40_000_000, ge=1)
    """pixels of an image"""
    max_regions: int = Field(256, ge=1)
    """regions of a request"""
    max_tokens: int = Field(1024, ge=1)
    """tokens of an answer"""
    max_turns: int = Field(64, ge=1)
    """messages of a conversation"""
    max_text: int = Field(20_000, ge=1)
    """characters of a conversation, an expression or the choices"""
    max_choices: int = Field(2000, ge=1)
    """choices of a closed set, expressions of a request"""
    max_seconds: float = Field(120.0, gt=0)
    """seconds for a request, including its wait"""


class ServeOptions(Limits):
    """How to serve a model."""

    host: str = "127.0.0.1"
    """address to listen on; any but localhost needs an API key or --no-auth"""
    port: int = Field(8642, ge=0, le=65535)
    """port to listen on; 0 takes a free one"""
    name: str | None = Field(None, min_length=1, max_length=200)
    """name of the model in the API (default: its folder's)"""
    detail: Detail = "fast"
    """fast, or careful: also encode each region's own crop, if the model was trained for it"""
    api_keys: Path | None = None
    """file of API keys, one per line; or REGIONGPT_API_KEYS, separated by spaces"""
    no_auth: bool = False
    """accept requests without a key on any address"""
    allow_urls: tuple[str, ...] = ()
    """hosts whose https URLs may be fetched as images; default: none"""
    rows: int = Field(ROWS, ge=1)
    """answers generated at a time"""
    token_budget: int | None = Field(None, ge=1)
    """limits memory: answers in the batch times tokens of the longest"""
    queue: int = Field(256, ge=1)
    """most requests, running or waiting; more get status 429"""
    scenes: int = Field(8, ge=1)
    """encoded images in the cache"""
    keep_images: int = Field(64, ge=0)
    """uploaded images kept"""
    keep_seconds: float = Field(3600.0, gt=0)
    """how long an uploaded image is kept after its last use"""
    engine: Literal["regiongpt", "vllm"] = "regiongpt"
    """what runs the language model"""
    tensor_parallel: int = Field(1, ge=1)
    """with vllm: GPUs that share its language model"""

    @model_validator(mode="after")
    def _check(self) -> "ServeOptions":
        if self.no_auth and self.api_keys:
            raise ValueError("--no-auth and --api-keys cannot be combined; leave one out")
        if self.engine != "vllm" and self.tensor_parallel > 1:
            raise ValueError("--tensor-parallel goes with --engine vllm; give it too")
        if self.engine == "vllm" and self.token_budget:
            raise ValueError("--token-budget goes with our own engine; --engine vllm takes what memory is free")
        if self.engine == "vllm" and find_spec("vllm") is None:
            raise ValueError("--engine vllm: vLLM is missing; install it: pip install 'regiongpt[vllm]'")
        return self

    def keys(self) -> list[str]:
        """The API keys, none if no key is needed.

        Raises:
            ConfigError: the file cannot be read or is empty; a key is too short; an open address has no key.
        """
        if self.no_auth:
            return []
        keys = os.environ.get(KEYS, "").split()
        if self.api_keys:
            try:
                read = self.api_keys.read_text(encoding="utf-8").split()
            except (OSError, ValueError) as error:
                raise ConfigError(f"--api-keys: {self.api_keys} cannot be read: {reason(error)}") from None
            if not read:
                raise ConfigError(f"--api-keys: {self.api_keys} holds no key; write one on a line")
            keys += read
        if any(len(key) < 16 or not key.isascii() for key in keys):
            raise ConfigError("an API key needs 16 ASCII characters or more; `openssl rand -hex 24` makes one")
        if not keys and not is_loopback(self.host):
            raise ConfigError(f"--host {self.host} is open to others; give --api-keys FILE, or --no-auth")
        return keys


def is_loopback(host: str) -> bool:
    """Whether a host is an address of this machine that no other can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
