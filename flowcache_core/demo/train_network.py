"""Trains the demo's diffusion network: `python -m flowcache_core.demo.train_network --steps 8000`.

Diffusion forcing: every chunk of a clip has a noise level of its own and attends to itself and to the chunks before it,
so that one network serves every schedule, from one chunk at a time to ten at once.

With `--teacher`, the network that a first training left is taught what it says under guidance, so that it draws what
the caption asks for without (guidance distillation: Meng et al., "On Distillation of Guided Diffusion Models", 2023).
That is decided where a video begins, so first chunks are taught so. Every other step is of long clips, where later
chunks learn from drawn ones as before: so that colours and motion stay what they are as chunks follow chunks.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..history.positions import rotate
from ..models.wan import Attend, Context, WanBackbone, WanConfig, WanNetwork
from .captions import TEXT_DIM, embed_caption
from .clips import render, sample_scenes
from .codec import TIME, LinearCodec
from .muon import Muon

CONFIG = WanConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=8, text_dim=TEXT_DIM)
FRAMES_PER_CHUNK = 3
CAPTION_DROPOUT = 0.1
FIRST_CLIPS = 256  # in the pool when training begins
CLIP_FRAMES = 99  # latent ones of a stored clip
SINGLE = 0.25  # share of clips with one shape: two are harder, and held-out captions have one in 40 %
# Share of the training's steps up to which clips are so many and so long, in chunks. What shapes a caption asks for is
# learned where a video begins, on many clips of one chunk: a later chunk sees it in the history. The long clips at the
# end make a long history nothing new.
STAGES = ((0.72, 40, 1), (0.86, 20, 2), (0.96, 8, 5), (1.0, 5, 12))
LASTING = ((8, 5), (5, 12))  # clips and chunks of the long ones beside a teacher's
SHIFT = 3.0
# A run's history is the network's own work, not a drawn clip. So that its faults do not add up, clean chunks carry some
# noise (up to so much of a noise level), or are what the network made of them in one step from a level between these.
# Two steps, harder ones for later chunks and at 40 % of the time gave smaller shapes and fewer right kinds, not more.
HISTORY_NOISE = 0.15
# What a run's chunks get wrong together, a tint or a lighter corner, is handed on and grows. So in half of the clips
# the history drifts away from its first chunk, and what is to be learned is the clip as it was drawn.
DRIFTING = 0.5
DRIFT = 0.35  # standard deviation of its end, in latents, which are of unit size
SELF_FORCED = 0.3
MILDEST, HARDEST = 0.3, 0.8
LAGS = (1 / 16, 1 / 10, 1 / 5, 1 / 4, 1 / 2, 1.0)  # of a chunk's whole way from noise to clean


@dataclass
class ClipPool:
    """Long encoded clips, of which training takes windows. The pool grows while training goes on.

    A window's first latent frame must stand for one pixel frame, as the first of every video does, so each latent
    frame is stored twice: as it is, and as if a video started there.
    """

    codec: LinearCodec
    rng: np.random.Generator
    frames: int  # latent frames of a stored clip
    capacity: int

    def __post_init__(self):
        shape = (self.capacity, 2, 16, self.frames, 8, 8)
        self.latents = torch.empty(shape, dtype=torch.float16)
        self.text = torch.empty(self.capacity, 8, TEXT_DIM)
        self.filled = 0
        self.added = 0

    def add(self, clips: int) -> None:
        scenes = sample_scenes(clips, self.rng, SINGLE)
        video = render(scenes, 1 + TIME * (self.frames - 1))
        stills = video[:, :, ::TIME]  # the last pixel frame of every latent frame
        alone = self.codec.encode(stills.transpose(1, 2).flatten(0, 1).unsqueeze(2))  # each a video of one frame
        alone = alone.unflatten(0, (clips, self.frames)).squeeze(3).transpose(1, 2)
        latents = torch.stack([self.codec.encode(video), alone], dim=1).half()
        for clip in range(clips):
            place = self.added % self.capacity
            self.latents[place] = latents[clip]
            self.text[place] = embed_caption(scenes.captions[clip])[0]
            self.added += 1
        self.filled = min(self.added, self.capacity)

    def windows(self, batch: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Windows [B, 16, frames, 8, 8], captions [B, 8, 64] and which windows begin a video [B]."""
        clips = self.rng.integers(self.filled, size=batch)
        starts = self.rng.integers(self.frames - frames + 1, size=batch)
        begins = torch.from_numpy(self.rng.random(batch) < (0.7 if frames > FRAMES_PER_CHUNK else 1.0))
        latents = torch.stack(
            [self.latents[c, 0, :, s : s + frames] for c, s in zip(clips, starts, strict=True)]
        ).float()
        firsts = torch.stack([self.latents[c, 1, :, s] for c, s in zip(clips, starts, strict=True)]).float()
        latents[:, :, 0] = torch.where(begins[:, None, None, None], firsts, latents[:, :, 0])
        text = torch.stack([self.text[c] for c in clips])
        return latents, text, begins


def sample_sigmas(batch: int, chunks: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Noise levels [B, chunks] and which chunks are worth a loss [B, chunks].

    A third of the clips have independent levels, some chunks clean; the others are caught at a random tick of a
    schedule: clean chunks, then active ones a lag apart, then chunks that have not begun.
    """
    independent = rng.random((batch, chunks))
    independent[rng.random((batch, chunks)) < 0.25] = 0.0
    lag = rng.choice(LAGS, size=(batch, 1))
    reached = rng.random((batch, 1)) * (1 + (chunks - 1) * lag)
    todo = 1 - (reached - lag * np.arange(chunks))  # share of the way a chunk still has to go
    mixed = rng.random((batch, 1)) < 0.35
    share = np.where(mixed, independent, todo.clip(0, 1))
    counted = np.where(mixed, independent > 0, (todo > 0) & (todo <= 1))
    sigmas = SHIFT * share / (1 + (SHIFT - 1) * share)
    return torch.from_numpy(sigmas).float(), torch.from_numpy(counted)


def drift(batch: int, chunks: int, rng: np.random.Generator) -> Tensor:
    """What is added to clips [B, 16, T, 8, 8] that drift: nothing in the first chunk, then evenly more of a smooth
    random tint; to the others nothing."""
    tint = F.interpolate(torch.randn(batch, 16, 2, 2), size=(8, 8), mode="bilinear", align_corners=True)
    drifting = torch.from_numpy(rng.random((batch, 1, 1, 1)) < DRIFTING)
    far = torch.linspace(0, DRIFT, chunks).repeat_interleave(FRAMES_PER_CHUNK)[:, None, None]
    return (tint * drifting).unsqueeze(2) * far


def bf16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones; timed."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(768, 768, dtype=dtype)
        a @ a
        begun = time.monotonic()
        for _ in range(3):
            a @ a
        return time.monotonic() - begun

    return seconds(torch.bfloat16) < seconds(torch.float32)


def full_attention(table: Tensor, mask: Tensor):
    """Attention over a whole clip at once under a block-causal mask."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, table), rotate(k, table)
        return F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask.to(q.dtype))

    return attend


def block_causal_mask(chunks: int, tokens: int) -> Tensor:
    """Added to the logits: 0 where a token's chunk is the query's or earlier, -inf elsewhere. [chunks x tokens]^2."""
    chunk = torch.arange(chunks).repeat_interleave(tokens)
    return torch.zeros(len(chunk), len(chunk)).masked_fill(chunk[:, None] < chunk[None, :], float("-inf"))


def head_of(backbone: WanBackbone, noisy: Tensor, sigmas: Tensor, context: Context, attend: Attend) -> Tensor:
    """A whole clip's velocity [B, 16, T, 8, 8] at each frame's noise level [B, T]."""
    return backbone.head(noisy, sigmas, backbone.trunk(noisy, sigmas, context, attend)).float()


class Trainer:
    def __init__(self, out: Path, seed: int, pool: int, rate: float = 1.5e-3):
        torch.manual_seed(seed)
        self.out = out
        self.rng = np.random.default_rng(seed)
        self.network = WanNetwork(CONFIG)
        self.average = WanNetwork(CONFIG)
        self.average.load_state_dict(self.network.state_dict())
        self.backbone = WanBackbone(self.network)
        self.pool = ClipPool(LinearCodec.fit(), self.rng, frames=CLIP_FRAMES, capacity=pool)
        matrices = [p for p in self.network.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.network.parameters() if id(p) not in chosen]
        self.optimizers = [
            Muon(matrices, lr=rate),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rate = rate
        self.teacher: WanBackbone | None = None
        self.guidance = 1.0
        self.null_text = embed_caption("")
        self.half = bf16_is_faster()
        self.step = 0
        self.seconds = 0.0

    def loss(self, batch: int, chunks: int) -> Tensor:
        frames = chunks * FRAMES_PER_CHUNK
        clean, text, begins = self.pool.windows(batch, frames)
        text = torch.where(torch.rand(batch, 1, 1) < CAPTION_DROPOUT, self.null_text, text)
        sigmas, counted = sample_sigmas(batch, chunks, self.rng)
        taught = self.teacher is not None and chunks == 1
        if self.teacher is not None and not taught:
            counted[:, 0] = False  # which the teacher teaches
        # A window out of the middle of a video has a past that is not seen: its first chunk is given, not learned.
        sigmas[~begins, 0], counted[~begins, 0] = 0.0, False
        noise = torch.randn_like(clean)
        per_frame = sigmas.repeat_interleave(FRAMES_PER_CHUNK, dim=1)
        level = per_frame[:, None, :, None, None]
        rows, columns = self.backbone.grid(*clean.shape[-2:])
        table = self.backbone.rotary.table(torch.arange(frames), rows, columns)
        attend = full_attention(table, block_causal_mask(chunks, FRAMES_PER_CHUNK * rows * columns))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            context = self.backbone.context(text)
            if chunks > 1 and self.rng.random() < SELF_FORCED:
                remembered = self.own_history(clean, context, attend)
            else:
                strength = HISTORY_NOISE * torch.rand(batch, 1, chunks, 1, 1).repeat_interleave(FRAMES_PER_CHUNK, dim=2)
                remembered = torch.lerp(clean, torch.randn_like(clean), strength)
            if chunks > 2:
                remembered = remembered + drift(batch, chunks, self.rng)
            noisy = torch.where(level == 0, remembered, torch.lerp(clean, noise, level))
            velocity = head_of(self.backbone, noisy, per_frame, context, attend)
            wanted = self.guided(noisy, per_frame, text, attend) if taught else noise - clean
        error = (velocity - wanted).square().mean(dim=(1, 3, 4))  # [B, frames]
        weight = counted.float().repeat_interleave(FRAMES_PER_CHUNK, dim=1)
        return (error * weight).sum() / weight.sum().clamp(min=1.0)

    @torch.no_grad()
    def guided(self, noisy: Tensor, sigmas: Tensor, text: Tensor, attend: Attend) -> Tensor:
        """The teacher's velocity [B, 16, T, 8, 8] under guidance; without a caption, its plain one."""
        assert self.teacher is not None
        null = self.null_text.expand_as(text)
        told = head_of(self.teacher, noisy, sigmas, self.teacher.context(text), attend)
        untold = head_of(self.teacher, noisy, sigmas, self.teacher.context(null), attend)
        return torch.lerp(untold, told, self.guidance)

    @torch.no_grad()
    def own_history(self, clean: Tensor, context: Context, attend: Attend) -> Tensor:
        """What the network itself makes of noised clips [B, 16, T, 8, 8] in one step: a history with its own faults."""
        batch, _, frames, _, _ = clean.shape
        sigmas = (MILDEST + (HARDEST - MILDEST) * torch.rand(batch, frames // FRAMES_PER_CHUNK)).repeat_interleave(
            FRAMES_PER_CHUNK, dim=1
        )
        level = sigmas[:, None, :, None, None]
        noisy = torch.lerp(clean, torch.randn_like(clean), level)
        return noisy - level * head_of(self.backbone, noisy, sigmas, context, attend)

    def run(self, steps: int) -> None:
        """Trains until `steps` in all (those of a run that was resumed included) are done."""
        while self.pool.filled < min(FIRST_CLIPS, self.pool.capacity):
            self.pool.add(8)
        shown, begun, before = [], time.monotonic(), self.seconds
        while self.step < steps:
            progress = self.step / steps
            batch, chunks = self.clips(progress)
            if self.step % 3 == 0:
                self.pool.add(1)
            rate = min(1.0, (self.step + 1) / 100) * min(1.0, (1 - progress) / 0.6 + 0.01)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * rate
                optimizer.zero_grad(set_to_none=True)
            loss = self.loss(batch, chunks)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            decay = min(0.999, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
            shown.append(loss.item())
            self.step += 1
            self.seconds = before + time.monotonic() - begun
            if self.step % 50 == 0:
                print(f"step {self.step}  {self.seconds / 60:.1f} min  loss {np.mean(shown):.4f}", flush=True)
                shown.clear()
            if self.step % 100 == 0:
                self.save()
        self.save()

    def clips(self, progress: float) -> tuple[int, int]:
        """How many clips the next step takes, and of how many chunks."""
        if self.teacher is None:
            return next((batch, chunks) for until, batch, chunks in STAGES if progress < until)
        return LASTING[self.step // 2 % len(LASTING)] if self.step % 2 else STAGES[0][1:]

    def save(self) -> None:
        torch.save(
            {
                "network": self.network.state_dict(),
                "average": self.average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
            },
            self.out.with_suffix(".tmp"),
        )
        self.out.with_suffix(".tmp").replace(self.out)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begins with these weights instead of random ones."""
        self.network.load_state_dict(weights)
        self.average.load_state_dict(weights)

    def learn_from(self, weights: dict[str, Tensor], guidance: float) -> None:
        """Learns what a teacher with these weights says under so much guidance."""
        network = WanNetwork(CONFIG)
        network.load_state_dict(weights)
        self.teacher, self.guidance = WanBackbone(network.requires_grad_(False)), guidance

    def resume(self) -> None:
        saved = torch.load(self.out, weights_only=True)
        self.network.load_state_dict(saved["network"])
        self.average.load_state_dict(saved["average"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seconds = saved["step"], saved["seconds"]


def weights_of(path: Path) -> dict[str, Tensor]:
    """The float32 weights of an exported file, or the averaged ones of a training checkpoint."""
    if path.suffix == ".safetensors":
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    return torch.load(path, map_location="cpu", weights_only=True)["average"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8000, help="in all")
    parser.add_argument("--out", type=Path, default=Path("out/demo_network.pt"), help="checkpoint, saved as it goes")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--start", type=Path, help="begin with the weights of an exported file or a checkpoint")
    parser.add_argument("--teacher", type=Path, help="learn what these weights say under guidance, and begin with them")
    parser.add_argument("--guidance", type=float, default=2.2, help="of the teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--pool", type=int, default=3000, help="encoded clips kept in memory (0.4 MB each)")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.out, options.seed, options.pool, options.rate)
    teacher = weights_of(options.teacher) if options.teacher else None
    if begun := weights_of(options.start) if options.start else teacher:
        trainer.start_from(begun)
    if teacher:
        trainer.learn_from(teacher, options.guidance)
    if options.resume:
        trainer.resume()
    trainer.run(options.steps)


if __name__ == "__main__":
    main()
