"""Regions from a Segment Anything model of transformers: whatever it finds at the points of a grid.

Shapes: P points, H and W of a mask as the model gives it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regiongpt.errors import CheckpointError
from regiongpt.images import ImageSource, load_image
from regiongpt.inference.proposals import Proposal, grid_points
from regiongpt.regions import Region

if TYPE_CHECKING:
    import torch

QUALITY = 0.88
"""The least overlap with the true object that the model itself must expect of a mask; likewise."""
STABILITY = 0.95
"""The least overlap of a mask drawn a little larger with the same drawn a little smaller; likewise."""
_OFFSET = 1.0  # logits up and down for these two


class Segmenter:
    """A Segment Anything model in transformers' format, from a hub name or folder, ready to look at images.

    Raises:
        CheckpointError: the model cannot be read, or is of another kind.
    """

    def __init__(self, path: str | Path, device: "str | torch.device | None" = None) -> None:
        from transformers import AutoConfig, SamModel
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        try:
            kind = AutoConfig.from_pretrained(path).model_type
            if kind == "sam":
                self.processor = AutoImageProcessor.from_pretrained(path, backend="pil")
                self.model = SamModel.from_pretrained(path).eval().to(device or "cpu")
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"expected a SAM model at {path}, which cannot be read: {reason}") from None
        if kind != "sam":
            raise CheckpointError(f"expected a SAM model at {path}, got the model_type {kind!r}")

    def propose(
        self,
        image: ImageSource,
        side: int = 32,
        *,
        min_quality: float = QUALITY,
        min_stability: float = STABILITY,
        batch: int = 64,
    ) -> list[Proposal]:
        """Masks of the objects at the points of a grid, with the model's own opinion of each as its score.

        Several points lie on one object, and each is answered by masks of a part, the object and what it belongs to:
        :func:`~regiongpt.inference.proposals.choose` leaves out what is there twice.

        Args:
            image: what :func:`regiongpt.load_image` takes.
            side: points a row and rows, 1 to 128.
            min_quality: least overlap with the true object that the model expects, in 0 to 1.
            min_stability: least overlap of a mask drawn larger with the same drawn smaller, in 0 to 1.
            batch: points that the model answers at a time.
        """
        import torch

        photo = load_image(image)
        points = [_centre(proposal.region) for proposal in grid_points(side, *photo.size)]
        device = self.model.device
        with torch.inference_mode():
            inputs = self.processor(photo, return_tensors="pt")
            sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
            features = self.model.get_image_embeddings(inputs["pixel_values"].to(device))
            scale = torch.tensor(sizes[1][0].tolist()[::-1]) / torch.tensor(sizes[0][0].tolist()[::-1])
            found: list[Proposal] = []
            for start in range(0, len(points), batch):
                asked_P2 = (torch.tensor(points[start : start + batch]) * scale).to(device)
                output = self.model(
                    image_embeddings=features,
                    input_points=asked_P2[None, :, None].to(features.dtype),
                    input_labels=torch.ones((1, len(asked_P2), 1), dtype=torch.long, device=device),
                    multimask_output=True,
                )
                masks_NHW, quality_N = output.pred_masks[0].flatten(0, 1), output.iou_scores[0].flatten()
                good = (quality_N >= min_quality) & (_stability(masks_NHW) >= min_stability)
                # Only what is good is drawn at the image's size, and a few at a time: that is where the memory goes.
                for quality, mask_HW in zip(quality_N[good].tolist(), masks_NHW[good], strict=True):
                    (drawn,) = self.processor.post_process_masks([mask_HW[None, None]], *sizes)
                    pixels = drawn[0, 0].cpu().numpy()
                    if pixels.any():
                        place = f"mask {len(found) + 1} of the SAM model"
                        found.append(Proposal(region=Region.mask(pixels), score=float(quality), place=place))
        return found


def _centre(region: Region) -> tuple[float, float]:
    x, y = region.to_dict()["point"]
    return float(x), float(y)


def _stability(logits_NHW: Any) -> Any:
    """How much of a mask is left when the threshold moves: (N,) in 0 to 1."""
    inner = (logits_NHW > _OFFSET).flatten(1).sum(1)
    outer = (logits_NHW > -_OFFSET).flatten(1).sum(1)
    return inner / outer.clamp_min(1)
