"""A detector or a backbone of Hugging Face's, from a folder or the hub.

Features are pooled from the last map of its convolutional backbone: 2,048 wide of a ResNet's C5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shards.errors import DataError
from shards.extract.boxes import Boxes, with_labels
from shards.extract.pooling import pool_boxes

_SHORTER, _LONGER = 600, 1000  # pixels of the sides of what a backbone sees


@dataclass(frozen=True)
class Network:
    """A loaded model and what prepares pictures for it."""

    name: str
    model: Any
    prepare: Any
    device: torch.device
    detects: bool
    """Whether it finds boxes."""

    def look(self, pictures: Sequence[Image.Image]) -> list[Seen]:
        """What it makes of pictures, as one batch."""
        if self.detects:
            inputs = dict(self.prepare(images=list(pictures), return_tensors="pt"))
            mask = inputs.get("pixel_mask")
        else:
            pixels, mask = _whole(pictures, self.prepare)
            inputs = {"pixel_values": pixels}
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        maps: list[torch.Tensor] = []
        backbone = _backbone(self.model) if self.detects else self.model
        hook = backbone.register_forward_hook(lambda _module, _in, out: maps.extend(_maps(out)))
        try:
            with torch.inference_mode():
                outputs = self.model(**inputs)
        finally:
            hook.remove()
        if not maps:
            raise DataError(
                f"{self.name} has no convolutional map to pool features from: choose a model with "
                "a ResNet or another convolutional backbone (DETR, Conditional or Deformable "
                "DETR, RT-DETR)"
            )
        return [
            Seen(maps[-1][i], _valid(mask, i), self._found(outputs, i, picture))
            for i, picture in enumerate(pictures)
        ]

    def _found(self, outputs: Any, i: int, picture: Image.Image) -> Found | None:
        if not self.detects:
            return None
        one = type(outputs)(
            logits=outputs.logits[i : i + 1], pred_boxes=outputs.pred_boxes[i : i + 1]
        )
        (result,) = self.prepare.post_process_object_detection(
            one, threshold=0.0, target_sizes=[(picture.height, picture.width)]
        )
        size = torch.tensor([picture.width, picture.height] * 2, device=result["boxes"].device)
        boxes = (result["boxes"] / size).clamp(0, 1).float().cpu().numpy()
        return Found(boxes, result["labels"].cpu().numpy(), result["scores"].float().cpu().numpy())


@dataclass(frozen=True)
class Found:
    """All that a detector says of a picture."""

    boxes: NDArray[np.float32]
    """(n, 4), fractions."""
    label: NDArray[np.int64]
    score: NDArray[np.float32]

    def best(self, least: int, most: int, threshold: float) -> Boxes:
        """The surest boxes: those above the threshold, but `least` to `most` of them."""
        good = (self.boxes[:, 2] > self.boxes[:, 0]) & (self.boxes[:, 3] > self.boxes[:, 1])
        order = np.argsort(-np.where(good, self.score, -1.0), kind="stable")
        above = int((good & (self.score >= threshold)).sum())
        count = min(max(above, least), most, int(good.sum()))
        if not count:
            raise ValueError("the detector finds no box in it")
        kept = order[:count]
        return with_labels(self.boxes[kept], self.label[kept], self.score[kept])


@dataclass(frozen=True)
class Seen:
    """A picture's map and, of a detector, boxes."""

    map: torch.Tensor
    """[C, H, W]."""
    valid: torch.Tensor
    """[2]: what part of its width and height is no padding."""
    found: Found | None

    def features(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, C) of boxes in fractions."""
        given = torch.from_numpy(boxes).to(self.map)
        pooled = pool_boxes(self.map, given, self.valid.to(self.map))
        out: NDArray[np.float32] = pooled.float().cpu().numpy()
        return out


def load(name: str, detects: bool, device: str | None) -> Network:
    """The model of that name, a folder or one of the hub's. DataError where it cannot be had, or is
    none of its kind."""
    import transformers

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = transformers.AutoModelForObjectDetection if detects else transformers.AutoModel
    what = "detector" if detects else "backbone"
    try:
        place = torch.device(chosen)
        model = kind.from_pretrained(name).to(place).eval()
        prepare = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot load the {what} {name} on {chosen}: {first}; give a folder that "
            "`save_pretrained` wrote, or a name on the hub and a network that reaches it"
        ) from None
    if detects and _backbone(model) is None:
        raise DataError(
            f"{name} is no detector with a convolutional backbone: choose DETR, Conditional or "
            "Deformable DETR, RT-DETR, or take its boxes to another's features (--boxes)"
        )
    return Network(name, model, prepare, place, detects)


def _whole(pictures: Sequence[Image.Image], prepare: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and their masks, [B, 3, H, W] and [B, H, W], scaled so that the shorter side has 600
    pixels and the longer at most 1,000 (Anderson et al. 2018) and padded. What prepares pictures
    for a classifier cuts their edges off, where boxes may be."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (prepare.image_mean, prepare.image_std))
    scaled = []
    for picture in pictures:
        scale = min(_SHORTER / min(picture.size), _LONGER / max(picture.size))
        size = [max(1, round(side * scale)) for side in picture.size]
        resized = picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)
        scaled.append((pixels - mean) / std)
    height, width = (max(p.shape[i] for p in scaled) for i in (1, 2))
    out = torch.zeros(len(scaled), 3, height, width)
    mask = torch.zeros(len(scaled), height, width, dtype=torch.long)
    for i, pixels in enumerate(scaled):
        out[i, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        mask[i, : pixels.shape[1], : pixels.shape[2]] = 1
    return out, mask


def _backbone(model: Any) -> Any:
    inner = getattr(model, "model", model)
    return getattr(inner, "backbone", None)


def _maps(value: Any) -> list[torch.Tensor]:
    """The maps [B, C, H, W] in an output, in its order."""
    if isinstance(value, torch.Tensor):
        return [value] if value.ndim == 4 else []
    if hasattr(value, "last_hidden_state"):
        return _maps(value.last_hidden_state)
    if isinstance(value, dict):
        value = list(value.values())
    return [m for v in value for m in _maps(v)] if isinstance(value, list | tuple) else []


def _valid(mask: torch.Tensor | None, i: int) -> torch.Tensor:
    """Of a padded batch: the parts of width and height that its i-th picture takes."""
    if mask is None:
        return torch.ones(2)
    rows, columns = mask[i].any(1).sum(), mask[i].any(0).sum()
    return torch.stack([columns / mask.shape[2], rows / mask.shape[1]]).float()
