"""The demo's latent space: 16 linear coefficients for each block of 4 frames x 8 x 8 pixels.

The space is fixed by principal component analysis on drawn clips before anything is trained. The diffusion network is
trained in it at once, and the VAE (Wan 2.1 layout) is trained to encode into it and to decode out of it, so that the
two trainings do not wait for each other. As in Wan, latent frame 0 stands for pixel frame 0 alone (here: repeated four
times) and latent frame k for pixel frames 4k-3 to 4k.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .clips import render, sample_scenes

CHANNELS = 16
TIME, SPACE = 4, 8  # pixel frames and pixels a latent covers


def blocks(video: Tensor) -> Tensor:
    """Cuts pixels [B, 3, 1 + 4k, H, W] into blocks [B, 1 + k, H/8, W/8, 768]."""
    video = torch.cat([video[:, :, :1].expand(-1, -1, TIME - 1, -1, -1), video], dim=2)
    batch, colours, frames, height, width = video.shape
    video = video.reshape(batch, colours, frames // TIME, TIME, height // SPACE, SPACE, width // SPACE, SPACE)
    return video.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def unblock(cut: Tensor) -> Tensor:
    """The inverse of `blocks`: [B, 1 + k, h, w, 768] back to pixels [B, 3, 1 + 4k, 8h, 8w]."""
    batch, frames, height, width, _ = cut.shape
    video = cut.reshape(batch, frames, height, width, 3, TIME, SPACE, SPACE).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return video.reshape(batch, 3, frames * TIME, height * SPACE, width * SPACE)[:, :, TIME - 1 :]


@dataclass(frozen=True)
class LinearCodec:
    """Pixels to latents and back by one matrix each way.

    Attributes:
        mean: [768] the mean block.
        components: [16, 768] orthonormal rows, most variance first.
        scale: [16] a coefficient is divided by it to give the latent: the fourth root of its variance, normalised so
            that latents have unit variance on average. Full whitening would make faint detail as loud as colour.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, clips: int = 512, frames: int = 17, seed: int = 0) -> "LinearCodec":
        rng = np.random.default_rng(seed)
        total, outer, count = torch.zeros(768, dtype=torch.float64), torch.zeros(768, 768, dtype=torch.float64), 0
        for _ in range(clips // 16):
            rows = blocks(render(sample_scenes(16, rng), frames)).flatten(0, 3).double()
            total, outer, count = total + rows.sum(0), outer + rows.T @ rows, count + len(rows)
        mean = total / count
        variances, vectors = torch.linalg.eigh(outer / count - torch.outer(mean, mean))
        variances, vectors = variances.flip(0)[:CHANNELS], vectors.flip(1)[:, :CHANNELS]
        vectors = vectors * vectors.abs().max(dim=0).indices.new_tensor(
            [1 if column[column.abs().argmax()] > 0 else -1 for column in vectors.T]
        )
        scale = variances**0.25
        scale = scale * (variances / scale**2).mean().sqrt()
        return cls(mean.float(), vectors.T.float().contiguous(), scale.float())

    def encode(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, 1 + 4k, H, W] in [-1, 1] to latents [B, 16, 1 + k, H/8, W/8]."""
        return (((blocks(video) - self.mean) @ self.components.T) / self.scale).movedim(-1, 1)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents [B, 16, 1 + k, h, w] to pixels [B, 3, 1 + 4k, 8h, 8w]."""
        return unblock((latent.movedim(1, -1) * self.scale) @ self.components + self.mean)
