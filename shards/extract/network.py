"""A detector or a backbone of Hugging Face's, from a folder or the hub.

Features are pooled from a map: the last of a convolutional backbone (2,048 wide of a ResNet's C5),
or the patches that a ViT or YOLOS ends with.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shards.errors import DataError, NodeError
from shards.extract.found import Found
from shards.extract.maps import last_map, valid_part
from shards.extract.pooling import pool_boxes

_SHORTER, _LONGER = 600, 1000  # pixels of the sides of what a backbone sees
_HASHED = 12  # hex digits of a model's weights in its name


@dataclass(frozen=True)
class Seen:
    """A picture's map and, of a detector, boxes."""

    map: torch.Tensor
    """[C, H, W]."""
    valid: torch.Tensor
    """[2]: what parts of its width and height show the picture; the rest is padding."""
    found: Found | None

    def features(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, C) of boxes in fractions."""
        given = torch.from_numpy(boxes).to(self.map)
        pooled = pool_boxes(self.map, given, self.valid.to(self.map))
        out: NDArray[np.float32] = pooled.float().cpu().numpy()
        return out


@dataclass(frozen=True)
class Network:
    """A loaded model and what prepares pictures for it."""

    name: str
    """For people and records: without folders, with the first digits of its weights' sha256."""
    model: Any
    prepare: Any
    device: torch.device
    detects: bool
    """Whether it finds boxes."""
    takes: frozenset[str]
    """The arguments of its `forward`."""

    def look(self, pictures: Sequence[Image.Image]) -> list[Seen | str]:
        """What it makes of pictures, as one batch; a reason for each that it cannot look at.
        DataError where memory is short; NodeError where the device is at fault."""
        try:
            return list(self._look(pictures))
        except torch.OutOfMemoryError:
            raise DataError(
                f"{self.device} has no memory for {len(pictures)} pictures at a time: give a "
                "smaller --batch"
            ) from None
        except torch.AcceleratorError as error:  # no picture's fault, and no other will pass
            raise NodeError(
                f"{self.device} failed: {_first_line(error)}; run the same command again, there or "
                "elsewhere"
            ) from None
        except (ValueError, RuntimeError, ArithmeticError, LookupError, TypeError) as error:
            if len(pictures) == 1:
                return [f"{self.name} cannot look at it: {_first_line(error)}"]
        return [one for picture in pictures for one in self.look([picture])]

    def _look(self, pictures: Sequence[Image.Image]) -> list[Seen]:
        if self.detects:
            inputs = dict(self.prepare(images=list(pictures), return_tensors="pt"))
            mask = inputs.get("pixel_mask")
            if mask is not None and "pixel_mask" not in self.takes:
                # It would take padding for a part of the picture.
                if len(pictures) > 1:
                    return [one for picture in pictures for one in self._look([picture])]
                del inputs["pixel_mask"]
        else:
            pixels, mask = _whole(pictures, self.prepare)
            inputs = {"pixel_values": pixels}
        height, width = inputs["pixel_values"].shape[2:]
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        if "interpolate_pos_encoding" in self.takes:
            inputs["interpolate_pos_encoding"] = True  # of a ViT, for other sizes than its own
        outputs_of: list[Any] = []
        seeing = _seeing(self.model) if self.detects else self.model
        hook = seeing.register_forward_hook(lambda _module, _in, out: outputs_of.append(out))
        try:
            with torch.inference_mode():
                outputs = self.model(**inputs)
        finally:
            hook.remove()
        found = last_map(outputs_of[-1], self.model.config, width, height)
        extent = torch.tensor(found.extent)
        return [
            Seen(found.values[i], valid_part(mask, i) * extent, self._found(outputs, i, picture))
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


def load(
    name: str, detects: bool, device: str | None = None, revision: str | None = None
) -> Network:
    """The model of that name, a folder or one of the hub's (revision: of its branches, tags or
    commits), tried on a grey picture. DataError where it cannot be had or used."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # it shows for a moment, on stderr
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = transformers.AutoModelForObjectDetection if detects else transformers.AutoModel
    what = "detector" if detects else "backbone"
    # Code from the hub is not run, nor asked about.
    given: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    try:
        model = kind.from_pretrained(name, **given).eval()
        prepare = transformers.AutoImageProcessor.from_pretrained(name, **given)
        shown = f"{_short(name)}@{_weights(model)}"
        place = torch.device(chosen)
        model = model.to(place)
    except Exception as error:  # they read strangers' files with several libraries
        problem = _first_line(error)
        remedy = "give a folder that `save_pretrained` wrote, or a name on the hub and a network "
        remedy += "that reaches it"
        if "timm library" in problem:
            remedy = "give a revision without it, where there is one (--revision no_timm of "
            remedy += "facebook/detr-resnet-50 and -101), or another detector, as RT-DETR"
        raise DataError(
            f"cannot load the {what} {name} on {chosen}: {problem.rstrip('.:')}; {remedy}"
        ) from None
    takes = frozenset(inspect.signature(model.forward).parameters)
    network = Network(shown, model, prepare, place, detects, takes)
    (seen,) = network.look([Image.new("RGB", (96, 64), (128, 128, 128))])
    if isinstance(seen, str):
        raise DataError(f"the {what} {name} is not to be used: {seen}")
    return network


def _short(name: str) -> str:
    """Without the folders before a folder: records are to be the same wherever it is."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else name


def _weights(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:_HASHED]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _seeing(model: Any) -> Any:
    """The part of a detector whose output is a map: its backbone, or a ViT as a whole."""
    inner = getattr(model, "model", model)
    return getattr(inner, "backbone", None) or model.base_model


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
