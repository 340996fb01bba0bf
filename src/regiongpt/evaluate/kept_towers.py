"""What a frozen tower makes of images, kept on disk for other models with the same tower: it is most of their work."""

import os
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class KeptTower:
    """Stands in for a model's ``encode_image``: an image that was encoded before is read, to the same numbers.

    Args:
        model: A RegionGPT model; its ``encode_image`` is still its own.
        folder: Gets a folder for each tower, with a file of float32 numbers for each image.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self._encode = model.encode_image
        content = sha256(repr(model.vision_tower.config.to_dict()).encode())
        for name, values in sorted(model.vision_tower.state_dict().items()):
            content.update(name.encode())
            content.update(values.detach().float().cpu().numpy().tobytes())
        self.folder = folder / content.hexdigest()[:32]

    def __call__(self, pixel_values: "Tensor") -> "Tensor":
        """Features of a batch of images, as the model's own method gives them."""
        import torch

        if pixel_values.device.type != "cpu" or pixel_values.dtype != torch.float32:
            found: Tensor = self._encode(pixel_values)
            return found
        name = sha256(pixel_values.contiguous().numpy().tobytes()).hexdigest()[:32]
        path = self.folder / f"{name}.npy"
        if path.is_file():
            return torch.from_numpy(np.load(path))
        encoded: Tensor = self._encode(pixel_values)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{name}.{os.getpid()}.npy")
        np.save(temporary, encoded.numpy())
        temporary.replace(path)
        return encoded
