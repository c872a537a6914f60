"""Measures the demo model: `python -m flowcache_core.demo.evaluate` prints what its model card says.

Clips are generated from held-out captions and noise and checked with the detector: how often the captioned colour and
kind are found, from the first chunk to the last; whether sizes drift; how smoothly the shapes move.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from ..generation import generate
from ..media.video import enlarged, frames_of
from ..models.presets import PRESETS, preset
from ..models.wan import WanBackbone
from ..settings import Settings
from .captions import embed_caption
from .clips import sample_scenes
from .codec import TIME
from .detector import Detection, detect
from .model import decode, load_network
from .shipped import NETWORK_FILE
from .train_network import FRAMES_PER_CHUNK

BATCH = 8


def captions(count: int, seed: int) -> list[str]:
    return sample_scenes(count, np.random.default_rng(seed)).captions


def generated(
    backbone: WanBackbone, texts: list[str], chunks: int, settings: Settings, seed: int, scale: float = 1.0
) -> torch.Tensor:
    """Makes latents [clips, 16, T, 8, 8] of as many clips as there are captions, in one batch."""
    text = torch.cat([embed_caption(caption) for caption in texts])
    null = embed_caption("").expand(len(texts), -1, -1)
    return generate(backbone, text, chunks, settings=settings, seed=seed, guidance_scale=scale, negative=null).latents


def by_part(found: list[Detection], parts: int) -> list[float]:
    """Mean score of each of so many equal parts of the clips, first to last."""
    shares = torch.stack([torch.stack([part.mean() for part in one.per_frame.tensor_split(parts)]) for one in found])
    return shares.mean(dim=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--preset", choices=list(PRESETS), default="off")
    parser.add_argument("--budget", type=int, default=None, help="clean chunks kept in the history")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--network", type=Path, default=NETWORK_FILE)
    parser.add_argument("--sheet", type=Path, help="write a picture of frames, a row a clip")
    options = parser.parse_args()
    backbone = load_network(options.network)
    texts = captions(options.clips, seed=12345)
    found, rows = [], []
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        settings = preset(options.preset, options.budget)
        latents = generated(backbone, batch, options.chunks, settings, seed=first, scale=options.guidance)
        for latent, caption in zip(latents, batch, strict=True):
            pixels = decode(latent[None], FRAMES_PER_CHUNK)
            found.append(detect(pixels, caption))
            rows.append(frames_of(pixels[:, :: TIME * FRAMES_PER_CHUNK * max(1, options.chunks // 12)]))
            print(f"{found[-1].score:6.1%}  {caption}", flush=True)
    parts = " ".join(f"{share:.1%}" for share in by_part(found, 4))
    print(
        f"captioned colour and kind found: {np.mean([one.score for one in found]):.1%}; by quarter of the clip: {parts}"
    )
    print(f"area, last quarter over first: {np.nanmean([one.growth for one in found]):.3f}")
    print(f"change of velocity from frame to frame: {np.nanmean([one.jerk for one in found]):.3f} pixels")
    if options.sheet:
        from PIL import Image

        sheet = np.concatenate([np.concatenate(list(enlarged(row, 2)), axis=1) for row in rows])
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(options.sheet)


if __name__ == "__main__":
    main()
