"""Whole runs of MAGI-1's sampler on small random networks, as upstream's golden runs were made."""

from dataclasses import replace

import torch

from flowcache_core.engine.loop import Engine
from flowcache_core.models.magi.forward import MagiSampling, magi_engine, magi_schedule
from flowcache_core.models.magi.network import MagiBackbone, MagiNetwork
from flowcache_core.models.magi.text import SpecialTokens, caption_text, null_text
from flowcache_core.settings import OFF
from tests.helpers.magi_weights import SMALL, SMALL_GATED, fill, normal
from tests.helpers.place import DEVICE

HEIGHT, WIDTH, FRAMES = 4, 6, 6
BASE = replace(SMALL, caption_tokens=800)
DISTILLED = replace(BASE, distilled=True)
GATED = replace(SMALL_GATED, caption_tokens=800)
RUNS = {  # network, chunks' worth of frames to generate, steps, given frames, order of 12 steps
    "base": (BASE, 7, 8, 0, "8,16,16"),
    "image": (BASE, 3, 8, 1, "8,16,16"),
    "video": (BASE, 4, 8, 14, "8,16,16"),
    "distill": (DISTILLED, 5, 12, 0, "8,16,16"),
    "distill_video": (DISTILLED, 3, 8, 8, "8,16,16"),
    "distill_other_order": (DISTILLED, 2, 12, 0, "16,16,8"),
    "gated": (GATED, 2, 8, 0, "8,16,16"),
    "long": (BASE, 12, 4, 0, "8,16,16"),
    "reuse": (DISTILLED, 5, 16, 0, "8,16,16"),
    "compressed": (DISTILLED, 8, 16, 0, "8,16,16"),
    "last": (DISTILLED, 2, 16, 0, "8,16,16"),
    "short": (SMALL, 3, 4, 1, "8,16,16"),
    "short_distill": (replace(SMALL, distilled=True), 3, 8, 8, "8,16,16"),
}


def tokens(width: int) -> SpecialTokens:
    shapes = {"caption_token": (1, width), "logo_token": (1, width), "other_tokens": (100, width)}
    return SpecialTokens(*(normal(name, shape).half() for name, shape in shapes.items()))


def given_of(name: str, frames: int | None = None) -> torch.Tensor | None:
    """Frames that come before a run's."""
    config, frames = RUNS[name][0], RUNS[name][3] if frames is None else frames
    return normal("prefix", (1, config.channels, frames, HEIGHT, WIDTH)) if frames else None


def magi_run(
    name: str,
    settings=OFF,
    sampling: MagiSampling | None = None,
    dtype=torch.float32,
    *,
    chunks: int | None = None,
    steps: int | None = None,
    given_frames: int | None = None,
    schedule=None,
    rows: int = 1,
    change=lambda latent: latent,
    **options,
) -> Engine:
    """A run of upstream's by its name.

    Args:
        chunks, steps, given_frames: other ones than that run's.
        schedule: in place of that run's, whose noise and captions are taken nevertheless.
        rows: videos in a batch, all alike but for their noise.
        change: makes the noise of the second video, or of the only one, from a chunk's.
        options: for `magi_engine`.
    """
    config, usual_chunks, usual_steps, usual_given, order = RUNS[name]
    given_frames = usual_given if given_frames is None else given_frames
    network = MagiNetwork(config, dtype, DEVICE)
    fill(network, velocity=config.input_scale / 3)
    backbone = MagiBackbone(network.requires_grad_(False).eval())
    usual = magi_schedule((chunks or usual_chunks) * FRAMES, steps or usual_steps, given_frames)
    total = usual.total_chunks
    noise = normal("noise", (1, config.channels, total * FRAMES, HEIGHT, WIDTH)).split(FRAMES, dim=2)
    caption = normal("caption", (1, 1, config.caption_tokens, config.caption_width))[0].expand(rows, -1, -1)
    mask = (torch.arange(config.caption_tokens) < 9).expand(rows, -1)
    special, null = tokens(config.caption_width), null_text(network.y_embedder.null_caption_embedding)

    def start(chunk: int) -> torch.Tensor:
        return torch.cat([*[noise[chunk]] * (rows - 1), change(noise[chunk])])

    return magi_engine(
        backbone,
        schedule or usual,
        settings,
        options.pop("text", lambda chunk: caption_text(caption, mask, special, total - 1 - chunk)),
        null._replace(embedding=null.embedding.expand(rows, -1, -1), mask=null.mask.expand(rows, -1)),
        options.pop("start", start),
        shape=(rows, config.channels, FRAMES, HEIGHT, WIDTH),
        device=DEVICE,
        sampling=sampling or MagiSampling(order=order),
        given=options.pop("given", given_of(name, given_frames)),
        **options,
    )
