"""Checks a clip against its caption: are the shapes that it names there, in each frame, in their colour?

No network is involved. The background is fitted as a linear gradient, and each pixel is explained as one colour of
the palette over it. The pixels of a captioned colour are then compared with an ideal circle, square and triangle of the
same centre and area: the best overlap tells the kind.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .clips import COLOURS, KINDS

AREA = (60, 700)  # pixels a shape may cover; those that `clips.py` draws cover 120 to 450
OVERLAP = 0.7  # least intersection over union with the ideal shape
STRAY = 2.4  # pixels further from the centre than this many root-mean-square radii are noise; a triangle's tip is at 2


@dataclass(frozen=True)
class Detection:
    """What was seen of the captioned shapes. Shapes are in the caption's order.

    Attributes:
        found: bool [frames, shapes] the shape is there, in its colour and of its kind.
        centre: [frames, shapes, 2] pixels, x then y; NaN in frames where the colour is not seen.
        area: [frames, shapes] pixels of the colour.
        overlap: [frames, shapes] intersection over union with the ideal shape of the captioned kind.
    """

    found: Tensor
    centre: Tensor
    area: Tensor
    overlap: Tensor

    @property
    def score(self) -> float:
        """Share of (frame, shape) pairs in which colour and kind are right, 0 to 1."""
        return self.found.float().mean().item()

    @property
    def per_frame(self) -> Tensor:
        """[frames] share of the captioned shapes that are found in each frame."""
        return self.found.float().mean(dim=1)

    @property
    def jerk(self) -> float:
        """Mean change of a centre's velocity from frame to frame, in pixels: near 0 for smooth motion between bounces.

        NaN if no shape is seen in three frames in a row.
        """
        return self.centre.diff(n=2, dim=0).norm(dim=-1).nanmean().item()

    @property
    def growth(self) -> float:
        """Area of the shapes in the last quarter of the clip over that in the first: 1 when sizes do not drift."""
        part = max(len(self.area) // 4, 1)
        return (self.area[-part:].mean() / self.area[:part].mean()).item()


def parse_caption(caption: str) -> list[tuple[int, int]]:
    """The (colour, kind) of each shape in a caption such as "a red circle and a blue square", as indices.

    Raises:
        ValueError: the caption is not of that form.
    """
    colours = list(COLOURS)
    shapes = []
    for phrase in caption.split(" and "):
        words = phrase.split()
        if len(words) != 3 or words[0] != "a" or words[1] not in colours or words[2] not in KINDS:
            raise ValueError(
                f'"{phrase}" in the caption "{caption}" is no shape. Write "a <colour> <kind>", joined by "and", with '
                f"the colours {', '.join(colours)} and the kinds {', '.join(KINDS)}."
            )
        shapes.append((colours.index(words[1]), KINDS.index(words[2])))
    return shapes


def detect(pixels: Tensor, caption: str) -> Detection:
    """Looks for the captioned shapes in every frame.

    Args:
        pixels: ComfyUI's images [T, H, W, 3] in [0, 1], or a clip [3, T, H, W] in [-1, 1].
        caption: as `Scenes.captions` writes them.

    Raises:
        ValueError: neither layout fits, or the caption names no shape.
    """
    if pixels.ndim != 4 or 3 not in (pixels.shape[0], pixels.shape[-1]):
        raise ValueError(f"Expected pixels [T, H, W, 3] or [3, T, H, W], got {list(pixels.shape)}.")
    if pixels.shape[-1] == 3:
        images = pixels.float().movedim(-1, 1)
    else:
        images = (pixels.float().movedim(0, 1) + 1) / 2
    height, width = images.shape[2:]  # images is [T, 3, H, W]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    place = torch.stack([x, y], dim=-1).flatten(0, 1)  # [N, 2] pixels
    basis = torch.stack([torch.ones(len(place)), *(place.T / max(height, width) - 0.5)])  # [3, N]
    parts = images.flatten(2).split(16)  # a few frames at a time stay in the processor's cache
    covered = torch.cat([_covered(part, basis) for part in parts])  # [T, K, N]
    shapes = [_measure(covered[:, colour], place, kind) for colour, kind in parse_caption(caption)]
    found, centre, area, overlap = (torch.stack(parts, dim=1) for parts in zip(*shapes, strict=True))
    return Detection(found=found, centre=centre, area=area, overlap=overlap)


def _covered(images: Tensor, basis: Tensor) -> Tensor:
    """Which pixels of images [T, 3, N] each colour of the palette covers: bool [T, K, N].

    A pixel p at a shape's soft edge is background + cover * (colour - background); the colour is the one for which
    that comes closest to p, and it counts from half cover on.
    """
    palette = torch.tensor(list(COLOURS.values()))  # [K, 3]
    norms = palette.square().sum(dim=1)[:, None]  # [K, 1]
    # A first guess at the background is what has no colour of the palette; then, what the first fit explains.
    to_palette = images.square().sum(dim=1) + (norms - 2 * palette @ images).amin(dim=1)
    background = _gradient(images, to_palette > 0.3**2, basis)
    background = _gradient(images, (images - background).square().sum(dim=1) < 0.12**2, basis)  # [T, 3, N]
    rise = images - background
    # With s = colour - background: cover = rise.s / s.s, and the squared distance left is |rise - cover * s|^2.
    along = palette @ rise - (rise * background).sum(dim=1, keepdim=True)  # [T, K, N]
    full = norms - 2 * palette @ background + background.square().sum(dim=1, keepdim=True)
    cover = (along / full).clamp(0, 1)
    left = cover * (cover * full - 2 * along)
    return (left <= left.amin(dim=1, keepdim=True)) & (cover > 0.5)


def _gradient(images: Tensor, where: Tensor, basis: Tensor) -> Tensor:
    """The linear gradient, drawn as [T, 3, N], that fits images [T, 3, N] best on the pixels `where` [T, N]."""
    weighted = basis * where[:, None]  # [T, 3, N]
    system = weighted @ basis.mT + 1e-3 * torch.eye(3)
    return torch.linalg.solve(system, weighted @ images.mT).mT @ basis


def _measure(mask: Tensor, place: Tensor, kind: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Found [T], centre [T, 2], area [T] and overlap [T] for the pixels of one colour, mask [T, N]."""
    mask = mask.float()
    for _ in range(2):
        area = mask.sum(dim=1)
        centre = (mask @ place) / area[:, None]
        dx, dy = (place.T[:, None] - centre.T[:, :, None]).unbind()  # [T, N] each
        squared = dx * dx + dy * dy
        spread = (mask * squared).sum(dim=1) / area
        mask = mask * (squared < STRAY**2 * spread[:, None])
    area = mask.sum(dim=1)
    # For each kind in the order of KINDS: a distance whose unit ball has that form, and the ball's area.
    gauges = (
        (squared.sqrt(), 3.1416),
        (torch.maximum(dx.abs(), dy.abs()), 4.0),
        (torch.maximum(0.8660 * dx.abs() - 0.5 * dy, dy), 5.1962),
    )
    overlaps = []
    for gauge, unit_area in gauges:
        ideal = (gauge < (area / unit_area).sqrt()[:, None]).float()
        both = (mask * ideal).sum(dim=1)
        overlaps.append(both / (area + ideal.sum(dim=1) - both).clamp(min=1))
    overlap = torch.stack(overlaps)  # [kinds, T]
    right = (overlap.argmax(dim=0) == kind) & (overlap[kind] > OVERLAP)
    return right & (area > AREA[0]) & (area < AREA[1]), centre, area, overlap[kind]
