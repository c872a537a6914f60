"""Other packages beside FlowCache, as published: `python -m flowcache_core.lab.packages` (`make bench-peers`).

cache-dit and the caches of diffusers itself run on diffusers' own transformer and its own diffusion-forcing pipeline,
which carry the demo model's weights; FlowCache runs in this engine. Every video is compared with the unaccelerated one
of the same package, and so is the time, in runs of one clip at a time. Both unaccelerated runs recompute the whole
window at every tick and give the same video, which is measured too.

Writes packages.json, and adds its rows to report.json where that is there.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.layouts import from_diffusers
from ..demo import NETWORK_FILE, load_network
from ..demo.captions import TEXT_DIM
from ..demo.train_network import CONFIG, FRAMES_PER_CHUNK
from ..models.skyreels import SkyReelsBackbone
from ..solvers.noise_levels import TRAINED_LEVELS
from ..storage.files import write_whole
from . import process
from .likeness import decibels, pixels
from .markdown import markdown
from .methods import CACHE_DIT as CACHE_DIT_METHOD
from .methods import EVERY, OURS, ours, plain
from .perceptual import st_lpips
from .report_file import NAME, add_to_report
from .runs import LATENT, Clips, Method, run
from .setups import SETUPS

SETUP = SETUPS["skyreels"]
SHIFT = 8.0
# Settings of the other packages. cache-dit: blocks computed first, steps of warm-up, threshold, most cached steps in a
# row (-1: any number), order of its Taylor series. diffusers: threshold of the first block; interval of its TaylorSeer.
CACHE_DIT = ((1, 8, 0.08, -1, 1), (1, 4, 0.12, 3, 1), (1, 4, 0.24, 3, 1), (1, 4, 0.24, -1, 2))
FIRST_BLOCK = (0.05, 0.1)
TAYLORSEER = (2, 3, 4)


@dataclass(frozen=True)
class Row:
    """One setting of one package.

    Attributes:
        method, setting: what was run.
        seconds: of a clip, median over the clips.
        speedup: over the unaccelerated run of the same package, median over the clips of the ratio.
        psnr: to that run, dB, mean over the clips; None for itself.
        error: standard error of the mean.
        clips: of every clip.
        st_lpips: distance to that run, mean over the clips; None without its package.
    """

    method: str
    setting: str
    seconds: float
    speedup: float
    psnr: float | None
    error: float | None
    clips: list[float]
    st_lpips: float | None


class Pipeline:
    """diffusers' SkyReels-V2 pipeline with the demo's network, from latents to latents, without a text encoder."""

    def __init__(self, network: Path, chunks: int):
        import diffusers

        weights = load_network(network).network.state_dict()
        self.transformer = diffusers.SkyReelsV2Transformer3DModel(
            num_attention_heads=CONFIG.num_heads,
            attention_head_dim=CONFIG.dim // CONFIG.num_heads,
            in_channels=CONFIG.in_dim,
            out_channels=CONFIG.out_dim,
            text_dim=TEXT_DIM,
            freq_dim=CONFIG.freq_dim,
            ffn_dim=CONFIG.ffn_dim,
            num_layers=CONFIG.num_layers,
        )
        self.transformer.load_state_dict(
            {name: weights[from_diffusers(name)] for name in self.transformer.state_dict()}
        )
        self.transformer.eval()
        self.pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(None, None, self.transformer, None, _scheduler())
        self.pipe.set_progress_bar_config(disable=True)
        self.frames = 4 * (chunks * FRAMES_PER_CHUNK - 1) + 1

    def __call__(self, clips: Clips) -> Tensor:
        """Latents [1, 16, T, h, w] of a single clip."""
        noise = torch.cat([clips.noise(chunk) for chunk in range(clips.chunks)], dim=2)
        # Latents that it is handed itself make it fail: it expects more than them of this.
        self.pipe.prepare_latents = lambda *told, **more: (noise, noise.shape[2], None, 0)
        with torch.no_grad():
            return self.pipe(
                prompt=None,
                prompt_embeds=clips.text,
                height=8 * LATENT[0],
                width=8 * LATENT[1],
                num_frames=self.frames,
                num_inference_steps=SETUP.steps,
                guidance_scale=1.0,
                ar_step=SETUP.lag,
                causal_block_size=FRAMES_PER_CHUNK,
                output_type="latent",
                return_dict=False,
            )[0]


def _scheduler():
    """diffusers' UniPC at SkyReels-V2's noise levels: by itself it spaces them from 1 to 0.001."""
    import diffusers

    class Scheduler(diffusers.UniPCMultistepScheduler):
        def set_timesteps(self, steps: int, device=None) -> None:
            first = 1.0 - 1.0 / TRAINED_LEVELS
            super().set_timesteps(device=device, sigmas=first * (steps - np.arange(steps)) / steps)

    return Scheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=TRAINED_LEVELS
    )


Switch = Callable[[Pipeline], AbstractContextManager[None]]


def settings() -> Iterable[tuple[str, str, Switch]]:
    """Every package and setting, with what switches it on for as long as it is entered."""
    for first, warmup, threshold, most, order in CACHE_DIT:
        told = f"F{first} W{warmup} R{threshold:g}" + (f" MC{most}" if most > 0 else "") + f", Taylor {order}"
        on = partial(cache_dit, first=first, warmup=warmup, threshold=threshold, most=most, order=order)
        yield CACHE_DIT_METHOD, told, on
    for threshold in FIRST_BLOCK:
        yield "diffusers, first block", f"threshold {threshold:g}", partial(first_block, threshold=threshold)
    for every in TAYLORSEER:
        yield "diffusers, TaylorSeer", f"every {every}", partial(taylorseer, every=every)


@contextmanager
def cache_dit(pipeline: Pipeline, first: int, warmup: int, threshold: float, most: int, order: int) -> Iterator[None]:
    """cache-dit's DBCache with its Taylor calibrator. It is told that there is one forward a step: it counts two."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    import cache_dit as package

    blocks = package.BlockAdapter(
        pipe=pipeline.pipe,
        transformer=pipeline.transformer,
        blocks=pipeline.transformer.blocks,
        forward_pattern=package.ForwardPattern.Pattern_3,
    )
    package.enable_cache(
        blocks,
        cache_config=package.DBCacheConfig(
            Fn_compute_blocks=first,
            Bn_compute_blocks=0,
            max_warmup_steps=warmup,
            residual_diff_threshold=threshold,
            max_continuous_cached_steps=most,
            enable_separate_cfg=False,
        ),
        calibrator_config=package.TaylorSeerCalibratorConfig(taylorseer_order=order),
    )
    try:
        yield
    finally:
        package.disable_cache(blocks)


@contextmanager
def first_block(pipeline: Pipeline, threshold: float) -> Iterator[None]:
    """diffusers' FirstBlockCache; it does not know SkyReels-V2's block by itself."""
    from diffusers.hooks import FirstBlockCacheConfig
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2TransformerBlock

    known = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    TransformerBlockRegistry.register(SkyReelsV2TransformerBlock, known)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    try:
        yield
    finally:
        pipeline.transformer.disable_cache()


@contextmanager
def taylorseer(pipeline: Pipeline, every: int) -> Iterator[None]:
    """diffusers' TaylorSeer, first order. Left to itself it hooks no block of SkyReels-V2: they are named here."""
    from diffusers.hooks import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=every,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn1", r"blocks\.\d+\.attn2", r"blocks\.\d+\.ffn"],
    )
    pipeline.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipeline.transformer.disable_cache()


Make = Callable[[Clips], Tensor]


@dataclass
class Made:
    """What a setting made of every clip, and how long each took."""

    latents: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def pixels(self) -> Tensor:
        return pixels(torch.cat(self.latents))

    def add(self, make: Make, clip: Clips) -> None:
        begun = time.perf_counter()
        self.latents.append(make(clip))
        self.seconds.append(time.perf_counter() - begun)


def row(method: str, setting: str, made: Made, unaccelerated: Made) -> Row:
    """Compares a setting with the unaccelerated run of its package."""
    faster = statistics.median(slow / fast for slow, fast in zip(unaccelerated.seconds, made.seconds, strict=True))
    alike = None if made is unaccelerated else decibels(made.pixels, unaccelerated.pixels)
    seen = st_lpips(made.pixels, unaccelerated.pixels)
    return Row(
        method,
        setting,
        round(statistics.median(made.seconds), 3),
        round(faster, 3),
        round(alike.mean, 3) if alike else None,
        round(alike.error, 3) if alike else None,
        [round(value, 3) for value in alike.each] if alike else [],
        round(seen.mean, 5) if seen else None,
    )


def bench(network: Path, count: int, chunks: int, say: Callable[[str], None]) -> dict:
    """Measures all packages on so many clips, all of them on one clip after another."""
    backbone = SkyReelsBackbone(load_network(network).network)  # tells whole time-steps, as the pipeline does
    whole = Clips.held_out(backbone, count, chunks)
    clips = [Clips(backbone, [caption], chunks, whole.seed + place) for place, caption in enumerate(whole.captions)]
    pipeline = Pipeline(network, chunks)

    def here(method: Method) -> Make:
        return lambda clip: run(method, SETUP, clip).latents

    theirs: dict[tuple[str, str], Switch] = {("diffusers, plain", EVERY): lambda pipeline: nullcontext()}
    theirs |= {(package, setting): switch for package, setting, switch in settings()}
    mine = {("plain", EVERY): here(plain(SETUP))} | {(OURS, method.setting): here(method) for method in ours(SETUP)}
    made = {key: Made() for key in (*theirs, *mine)}
    pipeline(Clips(backbone, whole.captions[:1], chunks))  # warm-up
    for place, clip in enumerate(clips):
        for key, switch in theirs.items():
            with switch(pipeline):
                made[key].add(pipeline, clip)
        for key, make in mine.items():
            made[key].add(make, clip)
        say(f"clip {place + 1} of {count}")
    rows = []
    for family in (theirs, mine):
        unaccelerated = made[next(iter(family))]
        rows += [row(*key, made[key], unaccelerated) for key in family]
    same = decibels(made[next(iter(mine))].pixels, made[next(iter(theirs))].pixels)
    return {
        "machine": process.machine(),
        "versions": {name: version(name) for name in ("diffusers", "cache-dit")},
        "clips": count,
        "chunks": chunks,
        "plain_to_plain_psnr": same.mean,
        "rows": [asdict(one) for one in rows],
    }


def table(found: dict) -> str:
    """Markdown of what `bench` found."""
    names = ("method", "setting", "faster", "seconds", "PSNR, dB", "ST-LPIPS")
    cells = [
        [
            one["method"],
            one["setting"],
            f"{one['speedup']:.1f}x",
            f"{one['seconds']:.2f}",
            "" if one["psnr"] is None else f"{one['psnr']:.1f} ± {one['error']:.1f}",
            "–" if one["st_lpips"] is None else f"{one['st_lpips']:.4f}",
        ]
        for one in found["rows"]
    ]
    versions = " and ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"**Other packages, as published** ({versions}, on diffusers' own transformer and pipeline with the demo's "
        f"weights; {found['clips']} clips of {found['chunks']} chunks, each by itself, all packages in turn on every "
        f"clip; speed and likeness to the unaccelerated run of the same package, which are "
        f"{found['plain_to_plain_psnr']:.0f} dB alike)\n\n" + markdown(names, cells)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--network", type=Path, default=NETWORK_FILE, help="another network of the demo's family")
    options = parser.parse_args()
    found = bench(options.network, options.clips, options.chunks, lambda words: print(words, flush=True))
    print(table(found))
    words = json.dumps(found, indent=1) + "\n"
    write_whole(options.out / "packages.json", lambda partly: partly.write_text(words))
    if (options.out / NAME).exists():
        add_to_report(options.out, "peers", found)


if __name__ == "__main__":
    main()
