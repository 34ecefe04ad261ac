"""Scores and heatmaps of images in memory: the library's front door, and what the jobs run on every batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from ais.ablation import ablate, check_chunk, full_float32, run_trunk
from ais.backbones import Backbone, BackboneSpec
from ais.errors import BackboneError
from ais.heads import HeadEnsemble, RegressionHead, as_ensemble, check_belongs
from ais.heatmaps import Weighting, heatmap_boxes, heatmap_weights, weighted_maps
from ais.images import Geometry, as_rgb_array
from ais.passes import Passes
from ais.picture import Explained, Picture, draw
from ais.placement import check_weighting

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = 8
_TRUNK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ScoreModel(nn.Module):
    """Backbone and head as one plain module: normalised images ``(B, 3, S, S)`` → scores ``(B,)``."""

    def __init__(self, backbone: Backbone, head: HeadEnsemble) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Return scores in rating units."""
        return self.head(self.backbone(images))


@dataclass(frozen=True)
class Explanation:
    """Scores and heatmaps of B images; float32 tensors on the CPU.

    Args:
        scores: ``(B,)`` in rating units, the mean over the heads.
        score_stds: ``(B,)`` standard deviation over the heads, NaN for a single head.
        importance: ``(B, C)`` the AIS that the heatmaps are made of: by default of the objective ``prediction``,
            ``s - s_k``; a given AIS vector repeated otherwise.
        ablated_scores: ``(B, C)`` score with each map ablated; ``None`` if a given AIS vector made it needless.
        feature_maps: ``(B, C, h, w)`` at the layer.
        heatmaps: ``(B, h, w)`` at the layer's resolution.
        boxes: ``(B, 4)`` left, top, right, bottom of what the model saw, in pixels of each original image.
        heatmap_boxes: ``(B, 4)`` the same of the heatmaps' cells, see `ais.heatmaps.heatmap_boxes`.
        weighting: with which the heatmaps were made.
        backbone: name and layer, for people.
        untrained: whether the backbone's weights are random.
        images: the B images as they were given, not copied; empty where only their preprocessed pixels were known.
    """

    scores: Tensor
    score_stds: Tensor
    importance: Tensor
    ablated_scores: Tensor | None
    feature_maps: Tensor
    heatmaps: Tensor
    boxes: Tensor
    heatmap_boxes: Tensor
    weighting: Weighting = "positive"
    backbone: str = ""
    untrained: bool = False
    images: tuple[Image | np.ndarray, ...] = ()

    def show(self, images: Sequence[int] | None = None, *, side: int = 256) -> Picture:
        """Draw images, heatmaps and both side by side, with scores and the size of one cell to scale.

        The last expression of a notebook's cell shows itself; elsewhere, ``show().save("picture.png")``. Needs neither
        IPython nor matplotlib.

        Args:
            images: which of the B, by position; the first eight by default.
            side: longest side of each view in pixels.

        Raises:
            ValueError: the images are not known, there is no such position, or none is asked for.
        """
        if not self.images:
            raise ValueError(
                "this explanation was made of preprocessed pixels and does not know its images; "
                "show what Explainer(...)(images) returns"
            )
        chosen = range(min(len(self.images), _SHOWN)) if images is None else images
        if not chosen or not all(0 <= index < len(self.images) for index in chosen):
            raise ValueError(f"images={list(chosen)}: give at least one position from 0 to {len(self.images) - 1}")
        explained = [
            Explained(
                as_rgb_array(self.images[index]),
                float(self.scores[index]),
                float(self.score_stds[index]),
                self.heatmaps[index].numpy(),
                self.boxes[index].numpy(),
                self.heatmap_boxes[index].numpy(),
            )
            for index in chosen
        ]
        caption = (
            self.backbone
            if images is not None or len(chosen) == len(self.images)
            else (f"{self.backbone}; the first {len(chosen)} of {len(self.images)} images")
        )
        own = self.ablated_scores is not None
        return draw(explained, self.weighting, caption, own=own, untrained=self.untrained, side=side)


class Explainer:
    """Predict scores and show where their evidence lies.

    Args:
        backbone: see `ais.load_backbone`; decides the device.
        head: a fitted or hand-made head; a copy of it moves to the backbone's device.
        weighting: ``"positive"`` or ``"signed"``, see `ais.heatmaps.heatmap_weights`.
        importance: ``(C,)`` an AIS vector for all images; by default each image gets its own, by exact ablation.
        preprocessing: ``"center_crop"`` or ``"letterbox"``.
        batch_size: images in one pass.
        chunk: maps ablated at once where the tail has to be run; chosen by size if not given.
        trunk_dtype: ``torch.bfloat16`` or ``torch.float16`` runs the trunk in lower precision; tail, head and
            differences stay float32.

    Raises:
        HeadError: the head does not belong to this backbone, weights or preprocessing.
        BackboneError: the importance vector has another length than the layer has maps, or values that are not finite.
        ValueError: no such weighting, preprocessing, batch size, chunk or dtype.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: RegressionHead | HeadEnsemble,
        *,
        weighting: Weighting = "positive",
        importance: Sequence[float] | np.ndarray | Tensor | None = None,
        preprocessing: str = "center_crop",
        batch_size: int = 16,
        chunk: int | None = None,
        trunk_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_weighting(weighting)
        check_chunk(chunk)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: must be at least 1")
        if trunk_dtype not in _TRUNK_DTYPES:
            raise ValueError(f"trunk_dtype is {trunk_dtype}: must be one of {', '.join(map(str, _TRUNK_DTYPES))}")
        self.backbone = backbone
        self.device = backbone.mean.device
        self.head = copy.deepcopy(as_ensemble(head)).to(self.device).eval()
        check_belongs(self.head, backbone, preprocessing)
        self.geometry = geometry_of(backbone.spec, preprocessing)
        self.weighting: Weighting = weighting
        self.batch_size = batch_size
        self.chunk = chunk
        self.trunk_dtype = trunk_dtype
        self.passes = Passes()
        self.importance: Tensor | None = None
        if importance is not None:
            # A copy: the vector may be a read-only view of a file.
            given = importance.detach() if isinstance(importance, Tensor) else torch.tensor(np.asarray(importance))
            self.importance = given.to(self.device, torch.float32, copy=True)
            maps = backbone.layer.map_shape[0] if backbone.layer else 0
            if self.importance.shape != (maps,):
                raise BackboneError(
                    f"the importance vector has shape {tuple(self.importance.shape)}, the layer has {maps} maps; "
                    "make it for this layer with jobs/importance.py"
                )
            unknown = (~self.importance.isfinite()).nonzero()
            if len(unknown):
                k = int(unknown[0])
                raise BackboneError(
                    f"the importance of map {k} is {float(self.importance[k])}, not a finite number; "
                    "make the vector again, or give 0 for maps that are not to count"
                )

    @property
    def module(self) -> ScoreModel:
        """Backbone and head as one plain module, for other tools."""
        return ScoreModel(self.backbone, self.head)

    def preprocess(self, images: Sequence[Image | np.ndarray]) -> Tensor:
        """Return the network's input ``(B, 3, S, S)`` float32 for PIL images or uint8 arrays ``(H, W, 3)``."""
        _check_list(images)
        pixels, _ = self._pixels(images)
        return self.backbone.normalise(pixels.to(self.device))

    def score(self, images: Sequence[Image | np.ndarray]) -> Tensor:
        """Return scores ``(B,)`` in rating units; works for every backbone."""
        _check_list(images)
        batches = [self.score_pixels(pixels)[0] for pixels, _ in self._batches(images)]
        return torch.cat(batches) if batches else torch.empty(0)

    def __call__(self, images: Sequence[Image | np.ndarray]) -> Explanation:
        """Score images and make their heatmaps.

        Args:
            images: PIL images or uint8 arrays ``(H, W, 3)``, of any sizes; at least one.

        Raises:
            BackboneError: this backbone refuses heatmaps.
            TypeError: not a list of images.
            ValueError: no images, or one that is not an image; one array instead of a list of them.
        """
        _check_list(images)
        if len(images) == 0:
            raise ValueError("explain needs at least one image")
        parts = [self.explain_pixels(pixels, boxes) for pixels, boxes in self._batches(images)]
        joined: dict[str, Any] = {}
        for field in fields(Explanation):
            values = [getattr(part, field.name) for part in parts]
            if isinstance(values[0], Tensor):
                joined[field.name] = torch.cat(values)
        return replace(parts[0], **joined, images=tuple(images))

    @full_float32()
    @torch.inference_mode()
    def score_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Score preprocessed pixels.

        Args:
            pixels: ``(B, S, S, 3)`` uint8, as `ais.images.Geometry.apply` makes them.

        Returns:
            scores ``(B,)`` and their standard deviation over the heads ``(B,)``, on the CPU.
        """
        each = torch.cat(self.passes.run(lambda part: self._score(pixels[part]), len(pixels)), dim=1)
        return each.mean(0).cpu(), _spread(each).cpu()

    @full_float32()
    @torch.inference_mode()
    def heatmap_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a run keeps of one batch of preprocessed pixels, and nothing that it does not.

        Args:
            pixels: ``(B, S, S, 3)`` uint8, as `ais.images.Geometry.apply` makes them.

        Returns:
            scores ``(B,)``, their standard deviation over the heads ``(B,)`` and heatmaps ``(B, h, w)``, on the CPU.

        Raises:
            BackboneError: this backbone refuses heatmaps.
        """

        def run(part: slice) -> tuple[Tensor, Tensor]:
            found = self._explain(pixels[part])
            return found.each, found.heatmaps

        parts = self.passes.run(run, len(pixels))
        each = torch.cat([each for each, _ in parts], dim=1)
        heatmaps = torch.cat([heatmaps for _, heatmaps in parts])
        # One copy off the device: each is a wait for everything before it.
        packed = torch.cat([each.mean(0)[:, None], _spread(each)[:, None], heatmaps.flatten(1)], dim=1).cpu()
        return packed[:, 0], packed[:, 1], packed[:, 2:].reshape(heatmaps.shape)

    @full_float32()
    @torch.inference_mode()
    def explain_pixels(self, pixels: Tensor, boxes: Tensor) -> Explanation:
        """Explain one batch of preprocessed pixels.

        Args:
            pixels: ``(B, S, S, 3)`` uint8, as `ais.images.Geometry.apply` makes them.
            boxes: ``(B, 4)`` of the same.

        Raises:
            BackboneError: this backbone refuses heatmaps.
        """
        # Each pass leaves the device before the next one.
        parts = self.passes.run(lambda part: self._explain(pixels[part]).on_cpu(), len(pixels))
        layer = self.backbone.layer
        assert layer is not None, "a backbone that can be split has a layer"
        each = torch.cat([part.each for part in parts], dim=1)
        importance = torch.cat([part.importance for part in parts])
        scores = each.mean(0)
        return Explanation(
            scores=scores,
            score_stds=_spread(each),
            importance=importance,
            ablated_scores=scores[:, None] - importance if self.importance is None else None,
            feature_maps=torch.cat([part.feature_maps for part in parts]),
            heatmaps=torch.cat([part.heatmaps for part in parts]),
            boxes=boxes.cpu(),
            heatmap_boxes=torch.from_numpy(heatmap_boxes(boxes.numpy(force=True), layer.extent, pixels.shape[1])),
            weighting=self.weighting,
            backbone=f"{self.backbone.spec.name}, layer {layer.name}",
            untrained=self.backbone.untrained,
        )

    def _score(self, pixels: Tensor) -> Tensor:
        """Scores ``(K, B)`` of every head, on the device."""
        images = self.backbone.normalise(to_device(pixels, self.device))
        if self.backbone.layer is None:
            return self.head.each(self.backbone(images))
        maps, context = run_trunk(self.backbone.split, images, self.trunk_dtype)
        return self.head.each(self.backbone.split.tail(maps, *context))

    def _explain(self, pixels: Tensor) -> _Found:
        images = self.backbone.normalise(to_device(pixels, self.device))
        split = self.backbone.split
        if self.importance is None:
            result = ablate(self.backbone, self.head, images, chunk=self.chunk, trunk_dtype=self.trunk_dtype)
            each, maps, importance = result.scores_each, result.feature_maps, result.effects
        else:
            maps, context = run_trunk(split, images, self.trunk_dtype)
            each = self.head.each(split.tail(maps, *context))
            importance = self.importance.expand(len(maps), -1)
        return _Found(each, importance, maps, weighted_maps(heatmap_weights(importance, self.weighting), maps))

    def _pixels(self, images: Sequence[Image | np.ndarray]) -> tuple[Tensor, Tensor]:
        prepared = [self.geometry.apply(as_rgb_array(image)) for image in images]
        pixels = np.stack([pixels for pixels, _ in prepared])
        return torch.from_numpy(pixels), torch.from_numpy(np.stack([box for _, box in prepared]))

    def _batches(self, images: Sequence[Image | np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(images), self.batch_size):
            yield self._pixels(images[start : start + self.batch_size])


@dataclass(frozen=True)
class _Found:
    """Of one pass: scores of each head ``(K, B)``, AIS ``(B, C)``, feature maps and heatmaps."""

    each: Tensor
    importance: Tensor
    feature_maps: Tensor
    heatmaps: Tensor

    def on_cpu(self) -> _Found:
        return _Found(self.each.cpu(), self.importance.cpu(), self.feature_maps.cpu(), self.heatmaps.cpu())


def _check_list(images: object) -> None:
    """Refuse what is not a list of images; one array of an image would pass for a list of grey ones."""
    if isinstance(images, np.ndarray) and (images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (3, 4))):
        raise ValueError(f"images is one array of shape {images.shape}: give a list of images, [image] for one")
    if isinstance(images, str | bytes) or not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise TypeError(
            f"images is {images!r:.80} of type {type(images).__name__}: give a list of PIL images or uint8 arrays"
        )


def to_device(pixels: Tensor, device: torch.device) -> Tensor:
    """Copy pixels to a device; to a GPU through pinned memory, so that nobody waits for the copy."""
    if device.type != "cuda":
        return pixels.to(device)
    return pixels.pin_memory().to(device, non_blocking=True)


def geometry_of(spec: BackboneSpec, preprocessing: str) -> Geometry:
    """How images are brought to a backbone's input; letterbox padding becomes zero after normalisation."""
    red, green, blue = (round(255 * value) for value in spec.mean)
    return Geometry(
        input_size=spec.input_size,
        resize_size=spec.resize_size,
        interpolation=spec.interpolation,
        mode=cast(Literal["center_crop", "letterbox"], preprocessing),  # Geometry refuses any other
        pad_rgb=(red, green, blue),
    )


def _spread(each: Tensor) -> Tensor:
    """Sample standard deviation ``(B,)`` over the heads of ``(K, B)`` scores."""
    return each.std(0) if len(each) > 1 else torch.full_like(each[0], torch.nan)
