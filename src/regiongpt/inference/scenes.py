"""Encoded images, the latest few of them kept."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from PIL import Image

from regiongpt.inference.engine import Scene


class Scenes:
    """A bounded memory of encoded images, found again by their pixels; serves several threads.

    What an image takes is its refined map (37 MiB in float32 for CLIP ViT-L/14 at 336 pixels) and the keys and values
    of its tokens (300 MiB in half precision for 576 tokens of a 7B Llama; half a MiB for the model of the package).

    Args:
        look: encodes an image.
        most: images to keep; the one used longest ago goes first. 0 keeps none.
    """

    def __init__(self, look: Callable[[Image.Image], Scene], most: int) -> None:
        self._look, self._most = look, most
        self._kept: OrderedDict[bytes, Scene] = OrderedDict()
        self._lock = threading.Lock()
        self._busy: dict[bytes, threading.Lock] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, photo: Image.Image) -> Scene:
        """The scene of an RGB image, encoded now unless it is kept."""
        key = content_key(photo)
        if (found := self._find(key)) is not None:
            return found
        with self._lock:
            busy = self._busy.setdefault(key, threading.Lock())
        with busy:  # whoever comes second with the same image waits for it
            if (found := self._find(key)) is not None:
                return found
            try:
                scene = self._look(photo)
                with self._lock:
                    self._kept[key] = scene
                    while len(self._kept) > self._most:
                        self._kept.popitem(last=False)
            finally:
                with self._lock:
                    self._busy.pop(key, None)
        return scene

    def _find(self, key: bytes) -> Scene | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]


def content_key(photo: Image.Image) -> bytes:
    """The same for two images of the same size and pixels, wherever they came from."""
    digest = hashlib.blake2b(f"{photo.mode} {photo.width} {photo.height} ".encode(), digest_size=16)
    digest.update(photo.tobytes())
    return digest.digest()
