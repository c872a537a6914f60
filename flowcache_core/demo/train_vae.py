"""Trains the demo's VAE from nothing: `python -m flowcache_core.demo.train_vae --minutes 90`.

Clips are drawn on the fly. `LinearCodec` fixes the latent space beforehand, so encoder and decoder are two plain
regressions that do not wait for each other: the encoder learns the codec's latents, the decoder learns the pixels
behind them. The decoder is at first fed the codec's latents, later also the encoder's own and noisy ones, since a
diffusion network will hand it nothing better.

One CPU core is enough. Arithmetic is bfloat16 around float32 weights; matrices are trained by Muon, vectors by AdamW.
"""

import argparse
import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from .clips import render, sample_scenes
from .codec import LinearCodec
from .vae import LATENT_CHANNELS, SHIPPED, Chain, Norm, WanVAE, load_vae

BATCH = 4  # clips
FRAMES, LONG_FRAMES = 9, 21  # pixel frames of a training clip, and in the last part of the run
LONG_FROM = 0.8  # fraction of the run from which clips are long (and half as many)
OWN_FROM = 0.3  # fraction of the run from which the decoder also sees the encoder's latents and noise
NOISE = 0.1  # largest deviation of the noise on the decoder's input
RATE = {"muon": 4e-3, "adamw": 3e-3}
WARMUP = 0.02  # fraction of the run
AVERAGE = 0.998  # decay of the weights' moving average, which is what is exported
REPORT_SECONDS = 240
HELD_OUT = 1_000_000  # seed of the clips that are never trained on


class NormSiLU(nn.Module):
    """Norm and SiLU as one compiled kernel: apart, they cost more than the convolutions between them."""

    def __init__(self, norm: Norm):
        super().__init__()
        self.gamma = norm.gamma

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1)  # [B, T, H, W, C], contiguous in the layout of channels last
        return _norm_silu(rows.flatten(0, 3), self.gamma.flatten()).view(rows.shape).movedim(-1, 1)


@torch.compile(dynamic=False)
def _norm_silu(rows: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(F.rms_norm(rows, gamma.shape, gamma, 1e-6))


def fast_copy(network: nn.Module) -> nn.Module:
    """A bfloat16 copy of an encoder or decoder with the same keys, laid out for speed."""
    network = copy.deepcopy(network).bfloat16()
    for module in list(network.modules()):
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif isinstance(module, Chain):
            for index in range(len(module) - 1):
                norm, after = module[index], module[index + 1]
                if isinstance(norm, Norm) and isinstance(after, nn.SiLU):
                    module[index], module[index + 1] = NormSiLU(norm), nn.Identity()
    return network


class Trainee:
    """One half of the VAE in training: fast bfloat16 weights, their float32 masters, and the masters' average."""

    def __init__(self, network: nn.Module):
        self.network = fast_copy(network)
        # Convolutions become matrices [outputs, the rest], which is what Muon takes; biases and gains become vectors.
        self.masters = [
            weight.detach().flatten(1 if weight.squeeze().ndim > 1 else 0).clone() for weight in network.parameters()
        ]
        self.average = [master.clone() for master in self.masters]
        self.steps = 0
        self.optimisers = {
            "muon": torch.optim.Muon(
                [master for master in self.masters if master.ndim == 2],
                weight_decay=0.0,
                adjust_lr_fn="match_rms_adamw",
            ),
            "adamw": torch.optim.AdamW(
                [master for master in self.masters if master.ndim == 1], betas=(0.9, 0.98), weight_decay=0.0
            ),
        }

    def learn(self, loss: Tensor, pace: float) -> None:
        """One optimiser step down `loss` at `pace` times the full learning rate."""
        weights = list(self.network.parameters())
        grads = torch.autograd.grad(loss, weights)
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad.float().reshape(master.shape)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = RATE[name] * pace
            optimiser.step()
        self.steps += 1
        with torch.no_grad():
            keep = min(AVERAGE, self.steps / (self.steps + 9))  # young averages forget their start faster
            torch._foreach_lerp_(self.average, self.masters, 1 - keep)
            for weight, master in zip(weights, self.masters, strict=True):
                weight.copy_(master.view(weight.shape))

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights, by the keys of an encoder or decoder."""
        named = self.network.named_parameters()
        return {name: average.view(weight.shape) for (name, weight), average in zip(named, self.average, strict=True)}

    def state(self) -> dict:
        optimisers = {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()}
        return {"masters": self.masters, "average": self.average, "steps": self.steps, "optimisers": optimisers}

    def restore(self, state: dict) -> None:
        self.steps = state["steps"]
        with torch.no_grad():
            for weight, master, average, old, old_average in zip(
                self.network.parameters(), self.masters, self.average, state["masters"], state["average"], strict=True
            ):
                master.copy_(old)
                average.copy_(old_average)
                weight.copy_(master.view(weight.shape))
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])


def fresh_vae(width: int) -> WanVAE:
    """A VAE that computes in normalised latents: its outer 1x1x1 convolutions do nothing yet (see `export`)."""
    vae = WanVAE(width)
    for name, weight in vae.named_parameters():
        if name.endswith(("residual.6.weight", "proj.weight")):
            nn.init.zeros_(weight)  # every block starts as the identity
    for conv in (vae.conv1, vae.conv2):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.get_parameter("bias"))
    return vae


def export(encoder: dict[str, Tensor], decoder: dict[str, Tensor], path: Path) -> None:
    """Writes the file that ships, in float16. Wan's files hold raw latents: normalised * std + mean."""
    width = len(decoder["head.0.gamma"])
    vae = WanVAE(width)
    vae.encoder.load_state_dict(encoder)
    vae.decoder.load_state_dict(decoder)
    mean, std = vae.mean.flatten(), vae.std.flatten()
    with torch.no_grad():
        for conv, scale, shift in ((vae.conv1, std, mean), (vae.conv2, 1 / std, -mean / std)):
            conv.weight.zero_()
            conv.get_parameter("bias").zero_()
            conv.weight[:LATENT_CHANNELS, :LATENT_CHANNELS, 0, 0, 0] = torch.diag(scale)
            conv.get_parameter("bias")[:LATENT_CHANNELS] = shift
    state = {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
    temporary = path.with_suffix(".partial")
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def psnr(video: Tensor, truth: Tensor) -> float:
    """Mean PSNR in dB of clips [B, 3, T, H, W] in [-1, 1], with a peak of 1 on the [0, 1] scale."""
    error = ((video.clamp(-1, 1) - truth) / 2).square().flatten(1).mean(1)
    return (-10 * error.log10()).mean().item()


@dataclass
class Scores:
    linear: float  # dB, the linear codec there and back
    decoder: float  # dB, codec latents through the decoder
    chain: float  # dB, encoder then decoder
    encoder_error: float  # mean squared error of normalised latents


@torch.no_grad()
def evaluate(vae: WanVAE, codec: LinearCodec, clips: int = 16, frames: int = 17) -> Scores:
    """Scores a loaded VAE (raw latents folded in) on held-out clips."""
    video = render(sample_scenes(clips, np.random.default_rng(HELD_OUT)), frames)
    latent = codec.encode(video)
    own = torch.cat([vae.encode_normalised(clip) for clip in video.split(4)])
    return Scores(
        linear=psnr(codec.decode(latent), video),
        decoder=psnr(torch.cat([vae.decode_normalised(part) for part in latent.split(4)]), video),
        chain=psnr(torch.cat([vae.decode_normalised(part) for part in own.split(4)]), video),
        encoder_error=(own - latent).square().mean().item(),
    )


@dataclass
class Run:
    """A training run and how far it is."""

    width: int
    seconds: float  # the whole run
    codec: LinearCodec = field(default_factory=LinearCodec.fit)
    spent: float = 0.0
    steps: int = 0

    def __post_init__(self):
        torch.manual_seed(0)
        vae = fresh_vae(self.width)
        self.encoder, self.decoder = Trainee(vae.encoder), Trainee(vae.decoder)

    @property
    def progress(self) -> float:
        return min(self.spent / self.seconds, 1.0)

    def step(self) -> tuple[float, float]:
        """One step of both halves. Returns their losses."""
        rng = np.random.default_rng([1, self.steps])
        long = self.progress > LONG_FROM
        video = render(sample_scenes(BATCH // 2 if long else BATCH, rng), LONG_FRAMES if long else FRAMES)
        latent = self.codec.encode(video)
        pace = min(1.0, self.progress / WARMUP + 0.01) * (1 + math.cos(math.pi * self.progress)) / 2

        own = self.encoder.network(_fast(video))[:, :LATENT_CHANNELS].float()
        encoder_loss = F.mse_loss(own, latent)
        self.encoder.learn(encoder_loss, pace)

        fed = latent
        if self.progress > OWN_FROM:
            rows = torch.from_numpy(rng.random((3, len(latent), 1, 1, 1, 1))).float()
            fed = torch.where(rows[0] < 0.5, own.detach(), latent)
            fed = fed + torch.randn(fed.shape) * NOISE * rows[1] * (rows[2] < 0.5)
        decoder_loss = F.mse_loss(self.decoder.network(_fast(fed)).float(), video)
        self.decoder.learn(decoder_loss, pace)
        self.steps += 1
        return encoder_loss.item(), decoder_loss.item()

    def save(self, path: Path) -> None:
        halves = {"encoder": self.encoder.state(), "decoder": self.decoder.state()}
        torch.save({"width": self.width, "spent": self.spent, "steps": self.steps, **halves}, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        if state["width"] != self.width:
            raise ValueError(f"{path} is of width {state['width']}, the run of {self.width}: pass --width accordingly.")
        self.spent, self.steps = state["spent"], state["steps"]
        self.encoder.restore(state["encoder"])
        self.decoder.restore(state["decoder"])


def _fast(x: Tensor) -> Tensor:
    return x.bfloat16().contiguous(memory_format=torch.channels_last_3d)


def train(run: Run, out: Path, checkpoint: Path) -> None:
    reported, losses = time.monotonic(), []
    while run.progress < 1:
        start = time.monotonic()
        losses.append(run.step())
        run.spent += time.monotonic() - start
        if run.progress == 1 or time.monotonic() - reported > REPORT_SECONDS:
            run.save(checkpoint)
            export(run.encoder.averaged(), run.decoder.averaged(), out)
            encoder_loss, decoder_loss = np.mean(losses, axis=0)
            print(
                f"{run.spent / 60:.1f} min, {run.steps} steps, losses {encoder_loss:.5f} {decoder_loss:.5f},",
                evaluate(load_vae(out), run.codec),
                flush=True,
            )
            reported, losses = time.monotonic(), []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=90.0, help="training time, evaluation not counted")
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where the VAE is written, every few minutes")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside --out (.pt)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # one kernel for each shape of activations
    run = Run(width=options.width, seconds=options.minutes * 60)
    checkpoint = options.out.with_suffix(".pt")
    if options.resume:
        run.restore(checkpoint)
    train(run, options.out, checkpoint)


if __name__ == "__main__":
    main()
