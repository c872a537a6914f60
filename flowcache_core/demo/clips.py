"""The synthetic clips that the demo model is trained on: coloured shapes that drift and bounce on a dull gradient.

Everything is drawn here, so training needs no download. A clip's caption names every shape that is in it, and shapes
of one clip differ in colour, which is what lets `detector.py` check a generated clip against its caption.
"""

from dataclasses import dataclass

import numpy as np
import torch

SIZE = 64  # pixels, both ways
FPS = 16
COLOURS = {
    "red": (0.90, 0.16, 0.16),
    "green": (0.15, 0.75, 0.25),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "cyan": (0.15, 0.85, 0.90),
    "magenta": (0.90, 0.25, 0.85),
    "white": (0.95, 0.95, 0.95),
}
KINDS = ("circle", "square", "triangle")
MAX_SHAPES = 2
EDGE = 2.0  # pixels over which a shape's edge fades: soft enough to move smoothly by fractions of a pixel


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes, drawn later. Arrays are [batch, shapes] unless said; a radius of 0 means no shape."""

    kind: np.ndarray
    colour: np.ndarray
    radius: np.ndarray  # pixels
    position: np.ndarray  # [batch, shapes, 2] pixels, x then y
    velocity: np.ndarray  # [batch, shapes, 2] pixels a frame
    background: np.ndarray  # [batch, 2, 3] RGB at both ends of the gradient
    angle: np.ndarray  # [batch] direction of the gradient, radians

    @property
    def captions(self) -> list[str]:
        names = list(COLOURS)
        return [
            " and ".join(
                f"a {names[colour]} {KINDS[kind]}" for kind, colour, radius in zip(*row, strict=True) if radius > 0
            )
            for row in zip(self.kind, self.colour, self.radius, strict=True)
        ]


def sample_scenes(batch: int, rng: np.random.Generator, single: float = 0.4) -> Scenes:
    """Draws `batch` scenes of one or two shapes that do not overlap at the start; a share `single` has one."""
    kind = rng.integers(len(KINDS), size=(batch, MAX_SHAPES))
    colour = np.stack([rng.permutation(len(COLOURS))[:MAX_SHAPES] for _ in range(batch)])
    radius = rng.uniform(9.0, 12.5, size=(batch, MAX_SHAPES))
    # One shape sits left or above of the other, so that two of the largest still start apart.
    first = rng.uniform(13.0, 19.0, size=(batch, 2))
    second = rng.uniform(45.0, 51.0, size=(batch, 2))
    mirror = rng.random(batch) < 0.5
    first[mirror, 1], second[mirror, 1] = SIZE - first[mirror, 1], SIZE - second[mirror, 1]
    position = np.stack([first, second], axis=1)
    alone = rng.random(batch) < single
    radius[alone, 1] = 0.0
    position[alone, 0] = rng.uniform(14.0, SIZE - 14.0, size=(int(alone.sum()), 2))
    speed = rng.uniform(0.5, 1.5, size=(batch, MAX_SHAPES, 1))
    heading = rng.uniform(0, 2 * np.pi, size=(batch, MAX_SHAPES))
    velocity = speed * np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    level = rng.uniform(0.10, 0.45, size=(batch, 2, 1))
    tint = rng.uniform(-0.07, 0.07, size=(batch, 2, 3))
    return Scenes(
        kind=kind,
        colour=colour,
        radius=radius,
        position=position,
        velocity=velocity,
        background=np.clip(level + tint, 0.0, 1.0),
        angle=rng.uniform(0, 2 * np.pi, size=batch),
    )


def trajectories(scenes: Scenes, frames: int) -> np.ndarray:
    """Positions over time, [batch, frames, shapes, 2]: shapes reflect off the walls and bounce off each other."""
    position, velocity = scenes.position.copy(), scenes.velocity.copy()
    low, high = scenes.radius[..., None] + 1.0, SIZE - 1.0 - scenes.radius[..., None]
    both = (scenes.radius[:, 0] > 0) & (scenes.radius[:, 1] > 0)
    reach = scenes.radius.sum(axis=1) + 1.0
    path = np.empty((len(position), frames, MAX_SHAPES, 2))
    for frame in range(frames):
        path[:, frame] = position
        position = position + velocity
        velocity = np.where(position < low, np.abs(velocity), np.where(position > high, -np.abs(velocity), velocity))
        gap = position[:, 1] - position[:, 0]
        distance = np.linalg.norm(gap, axis=-1)
        normal = gap / np.maximum(distance, 1e-6)[:, None]
        approach = ((velocity[:, 1] - velocity[:, 0]) * normal).sum(axis=-1)
        hit = both & (distance < reach) & (approach < 0)
        impulse = np.where(hit, approach, 0.0)[:, None] * normal  # equal masses: the normal parts are exchanged
        velocity[:, 0] += impulse
        velocity[:, 1] -= impulse
    return path


def _distance(kind: torch.Tensor, radius: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels to a shape's edge, negative inside; `kind` and `radius` broadcast over the offsets."""
    circle = torch.sqrt(dx * dx + dy * dy) - 0.95 * radius
    square = torch.maximum(dx.abs(), dy.abs()) - 0.82 * radius
    triangle = torch.maximum(0.8660 * dx.abs() - 0.5 * dy, dy) - 0.54 * radius
    return torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))


def render(scenes: Scenes, frames: int) -> torch.Tensor:
    """Draws the scenes.

    Returns:
        float32 pixels in [-1, 1], [batch, 3, frames, SIZE, SIZE].
    """
    path = torch.from_numpy(trajectories(scenes, frames)).float()
    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
    y, x = grid[:, None], grid[None, :]
    angle = torch.from_numpy(scenes.angle).float()[:, None, None]
    along = ((x - SIZE / 2) * torch.cos(angle) + (y - SIZE / 2) * torch.sin(angle)) / SIZE + 0.5
    ends = torch.from_numpy(scenes.background).float()  # [batch, 2, 3]
    video = ends[:, 0, :, None, None] + (ends[:, 1] - ends[:, 0])[:, :, None, None] * along.clamp(0, 1)[:, None]
    video = video[:, :, None].expand(-1, -1, frames, -1, -1).clone()
    palette = torch.tensor(list(COLOURS.values()))
    for shape in range(MAX_SHAPES):
        radius = torch.from_numpy(scenes.radius[:, shape]).float()[:, None, None, None]
        kind = torch.from_numpy(scenes.kind[:, shape])[:, None, None, None]
        offset = path[:, :, shape, :, None, None]
        distance = _distance(kind, radius, x - offset[:, :, 0], y - offset[:, :, 1])
        cover = (0.5 - distance / EDGE).clamp(0, 1)
        cover = cover * cover * (3 - 2 * cover) * (radius > 0)
        colour = palette[torch.from_numpy(scenes.colour[:, shape])][:, :, None, None, None]
        video += cover[:, None] * (colour - video)
    return video * 2 - 1
