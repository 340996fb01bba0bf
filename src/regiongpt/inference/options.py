"""How to generate an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from regiongpt.errors import ConfigError


class Generation(TypedDict, total=False):
    """How to generate, as keyword arguments; see :meth:`RegionPredictor.ask` for what each means."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The same, checked and with defaults.

    Raises:
        ConfigError: one of them is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"expected max_new_tokens of at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"expected a temperature of 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"expected top_p above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"expected a seed from 0 to 2**63 - 1, got {self.seed}")
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(string, str) and string for string in strings):
            raise ConfigError(f"expected stop as strings that are not empty, got {self.stop!r}")
        object.__setattr__(self, "stop", strings)
