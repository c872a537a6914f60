"""Whole runs of MAGI-1's sampler on small random networks, as upstream's golden runs were made."""

from dataclasses import replace

import torch

from flowcache_core.models.magi.engine import MagiEngine, MagiSampling, magi_schedule
from flowcache_core.models.magi.network import MagiBackbone, MagiNetwork
from flowcache_core.models.magi.text import SpecialTokens, caption_text, null_text
from flowcache_core.models.presets import OFF
from tests.helpers.magi_weights import SMALL, SMALL_GATED, fill, normal

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


def engine(name: str, settings=OFF, sampling: MagiSampling | None = None, dtype=torch.float32, **options) -> MagiEngine:
    config, chunks, steps, given_frames, order = RUNS[name]
    network = MagiNetwork(config, dtype)
    fill(network, velocity=config.input_scale / 3)
    backbone = MagiBackbone(network.requires_grad_(False).eval())
    schedule = magi_schedule(chunks * FRAMES, steps, given_frames)
    given = normal("prefix", (1, config.channels, given_frames, HEIGHT, WIDTH)) if given_frames else None
    noise = normal("noise", (1, config.channels, schedule.total_chunks * FRAMES, HEIGHT, WIDTH)).split(FRAMES, dim=2)
    caption = normal("caption", (1, 1, config.caption_tokens, config.caption_width))[0]
    mask = (torch.arange(config.caption_tokens) < 9)[None]
    special = tokens(config.caption_width)
    return MagiEngine(
        backbone,
        schedule,
        settings,
        text=options.pop("text", lambda chunk: caption_text(caption, mask, special, schedule.total_chunks - 1 - chunk)),
        null=null_text(network.y_embedder.null_caption_embedding),
        start=lambda chunk: noise[chunk],
        sampling=sampling or MagiSampling(order=order),
        given=given,
        **options,
    )
