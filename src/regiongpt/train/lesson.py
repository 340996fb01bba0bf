"""A model with its loss as one module, so that whatever wraps it sees all that is computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regiongpt.errors import ConfigError
from regiongpt.model.processing import IGNORED

Loss = Callable[[Any, dict[str, Any], Any], Tensor]
"""Of a model, a batch, and the number of target tokens in the whole optimiser step."""


class Lesson(nn.Module):
    """A model with its loss, as one module: whatever wraps it sees all that is computed.

    Args:
        model: What is trained.
        loss: Takes the model, a batch and the number of target tokens in the optimiser step.
        precision: ``torch.bfloat16`` to multiply matrices in it; weights, sums and the loss stay float32.
    """

    def __init__(self, model: nn.Module, loss: Loss, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.loss, self.precision = model, loss, precision

    def forward(self, inputs: dict[str, Any], items: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss; and where the model tells them, that of each target token and the task it belongs to."""
        inputs = dict(inputs)
        tasks = inputs.pop("tasks", None)
        labels = inputs["labels"] if "labels" in inputs else inputs["packed_labels"]
        with self._outputs() as outputs, self._autocast(labels.device.type):
            loss = self.loss(self.model, inputs, items)
        losses = next((getattr(each, "target_losses", None) for each in outputs), None)
        if losses is None or tasks is None:
            return loss, losses, None
        return loss, losses, tasks[:, 1:][labels[:, 1:] != IGNORED]

    @contextmanager
    def _outputs(self) -> Iterator[list[Any]]:
        outputs: list[Any] = []
        handle = self.model.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            yield outputs
        finally:
            handle.remove()

    def _autocast(self, device: str) -> Any:
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the language model, alone or inside RegionGPT.

    Raises:
        ConfigError: They are not to be found.
    """
    language: Any = getattr(model, "language_model", model)
    count = language.config.get_text_config().num_hidden_layers
    for part in language.modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return list(part)
    raise ConfigError(
        f"engine: expected a language model with a list of {count} layers, got {type(language).__name__} without one; "
        "leave out compile and sharding = 'fsdp'"
    )
