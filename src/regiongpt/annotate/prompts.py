"""What a captioner is told and shown: ten prompts a stage, and the close-up of a region.

Paper: §3.3, Figure 3
"""

from hashlib import blake2b
from typing import Final, Literal

from PIL import Image
from pydantic import Field

from regiongpt.regions import Region
from regiongpt.settings import Settings

Mode = Literal["crop", "context", "full"]
"""What a region's caption is conditioned on: its crop alone, with the global caption, and with the class name too."""
MODES: Final[tuple[Mode, ...]] = ("crop", "context", "full")

GLOBAL: Final = (
    "Describe the image in detail.",
    "Write a detailed caption for this whole image.",
    "What does the image show? Cover the scene, the objects in it and how they are arranged.",
    "Give a thorough account of everything that can be seen in this image.",
    "Explain what is going on in the image, from the main subject to the background.",
    "Look at the image closely and describe it for someone who cannot see it.",
    "Describe the setting, the objects and their positions in this image.",
    "Tell me about this image: what is in it, where, and what is happening.",
    "Summarize the content of the image in a few detailed sentences.",
    "Describe the scene, including colours, materials and how the objects relate to each other.",
)
"""Prompts of stage 1, about the whole image."""

CONTEXT: Final = "In the context of the entire image, {caption}"
"""How every prompt of stage 2 begins: alike for all regions of an image, so that an engine can reuse what it read."""

REGION: Final = (
    "describe the {name} in the close-up region in detail.",
    "give a detailed description of the {name} in this close-up.",
    "what does the {name} in the close-up look like? Mention colour, shape and material.",
    "write a detailed caption for the {name} that the close-up shows.",
    "look closely at the {name} in the close-up region and describe its appearance and its surroundings.",
    "describe the {name} in this close-up for someone who has to find it in the image.",
    "explain in detail what can be seen of the {name} in the close-up region.",
    "tell me everything that you can see about the {name} in the close-up: its parts, colours and state.",
    "describe the {name} in the close-up region, and how it relates to what is around it.",
    "share a thorough description of the {name} in the close-up, in a few full sentences.",
)
"""Prompts of stage 2, behind the context; ``{name}`` is the class name, or "object" where it is not told."""

LOCATE: Final = (
    "The regions of this image are outlined and numbered from 1 to {count}. Which of them does this describe: "
    '"{caption}" Answer with its number alone.'
)


class Closeup(Settings):
    """How the picture of a region is cut out of its image."""

    crop_margin: float = Field(0.15, ge=0, le=4)
    """context around a region on each side, as a share of its box"""
    crop_least: int = Field(48, ge=1)
    """least side of a crop in pixels, as far as the image has them; smaller regions get more context"""
    crop_most: int = Field(768, ge=16)
    """longest side of what a model is shown in pixels; larger crops and images are scaled down"""

    def window(self, region: Region, width: int, height: int) -> tuple[int, int, int, int]:
        """Half-open xyxy of a region's crop, in pixels of its image of width x height."""
        x0, y0, x1, y1 = map(float, region.bounds(width, height))
        sides = []
        for low, high, size in ((x0, x1, width), (y0, y1, height)):
            half = max((high - low) * (0.5 + self.crop_margin), self.crop_least / 2)
            middle = min(max((low + high) / 2, min(half, size / 2)), max(size - half, size / 2))
            sides.append((max(0, int(middle - half)), min(size, -int(-(middle + half) // 1))))
        (left, right), (top, bottom) = sides
        return left, top, right, bottom

    def crop(self, image: Image.Image, region: Region) -> Image.Image:
        """The close-up of a region; its aspect is kept."""
        return self.shrink(image.crop(self.window(region, *image.size)))

    def shrink(self, image: Image.Image) -> Image.Image:
        """The image, scaled down if its longer side is above ``crop_most``."""
        if max(image.size) <= self.crop_most:
            return image
        scale = self.crop_most / max(image.size)
        return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def draw(seed: int, item: str, count: int) -> int:
    """A number below ``count`` that only the seed and the item decide."""
    return int.from_bytes(blake2b(f"{seed} {item}".encode(), digest_size=8).digest()) % count


def region_prompt(version: int, mode: Mode, category: str) -> str:
    """What stage 2 asks about a crop, without the context: a whole sentence in mode ``crop``.

    Args:
        version: Which of :data:`REGION`.
        mode: Only ``full`` names the class.
        category: Class name, as people write it.
    """
    text = REGION[version].format(name=category if mode == "full" else "object")
    return text[0].upper() + text[1:] if mode == "crop" else text


def context(caption: str) -> str:
    """How a prompt of stage 2 begins, with the global caption: ends in a comma, before what is asked."""
    return CONTEXT.format(caption=caption.strip().rstrip(".!,;: ")) + ","
