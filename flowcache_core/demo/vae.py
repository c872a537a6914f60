"""The demo's VAE: the Wan 2.1 architecture at a small width, so that ComfyUI's stock loader reads the same file.

Pixels [B, 3, 1 + 4k, 8h, 8w] in [-1, 1] become latents [B, 16, 1 + k, h, w]. Everything is causal in time: frame 0
is coded alone, as an image, and nothing looks ahead, so a video can be decoded chunk by chunk while it is being
generated. A causal convolution then needs the last two frames of the chunk before; `Memory` holds them.

Two latent spaces are in play. The file speaks *raw* latents, as Wan's does: `encode` and `decode`. A diffusion network
sees *normalised* ones, (raw - mean) / std: `encode_normalised` and `decode_normalised`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..models.latent_spaces import WAN_21_MEAN, WAN_21_STD

SHIPPED = Path(__file__).with_name("vae.safetensors")
LATENT_CHANNELS = 16
WIDENING = (1, 2, 4, 4)  # channels of each resolution, in units of the width
SHRINKS_TIME = (False, True, True)  # of the three halvings of height and width, those that halve the frames as well
BLOCKS = 2  # residual blocks a resolution in the encoder; the decoder has one more
REACH = 2  # frames a causal convolution of kernel 3 looks back
AT_ONCE = 3  # latent frames that a processor decodes at once: what is between two layers then stays in its cache


class Memory(dict):
    """What one stream of chunks carries on: for each causal layer, the last frames of its input.

    Start a video with an empty `Memory()` and hand the same one to `decode` for every further chunk.
    """


class CausalConv3d(nn.Conv3d):
    """A convolution whose time kernel ends at the present frame; before the first frame it sees zeros."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int, int]):
        time, height, width = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(inputs, outputs, (time, height, width), padding=(0, height // 2, width // 2))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        if self.kernel_size[0] == 1:
            return super().forward(x)
        past = None if memory is None else memory.get(self)
        x = F.pad(x, (0, 0, 0, 0, REACH, 0)) if past is None else torch.cat([past, x], dim=2)
        if memory is not None:
            memory[self] = x[:, :, -REACH:].clone()  # a view would keep the whole activation alive
        return self._frame_by_frame(x) if x.device.type == "cpu" else super().forward(x)

    def _frame_by_frame(self, x: Tensor) -> Tensor:
        """The same as a 2D convolution of every frame with those before it as further channels. Torch has a fast 3D one
        for a processor too, but gives what is as small as a chunk here to one that is four times slower."""
        around = x.unfold(2, self.kernel_size[0], 1).permute(0, 2, 1, 5, 3, 4)  # [B, T, C, time, H, W]
        made = F.conv2d(around.flatten(2, 3).flatten(0, 1), self.weight.flatten(1, 2), self.bias, 1, self.padding[1:])
        return made.unflatten(0, (len(x), -1)).transpose(1, 2)


class Norm(nn.Module):
    """Scales each position's channel vector to unit mean square. `ones` is the number of axes after the channels."""

    def __init__(self, channels: int, ones: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * ones))

    def forward(self, x: Tensor) -> Tensor:
        square = x.square().sum(dim=1, keepdim=True)  # torch's norm over channels is slow on a processor
        return x * (len(self.gamma) / square.clamp_min(1e-24)).sqrt() * self.gamma


class Chain(nn.Sequential):
    """Layers in a row; those that look back in time are handed the memory."""

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        for layer in self:
            x = layer(x, memory) if isinstance(layer, (CausalConv3d, Residual, Downsample, Upsample)) else layer(x)
        return x


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.residual = Chain(
            Norm(inputs),
            nn.SiLU(),
            CausalConv3d(inputs, outputs, 3),
            Norm(outputs),
            nn.SiLU(),
            nn.Identity(),  # Wan has a dropout here; it keeps the numbering of the keys
            CausalConv3d(outputs, outputs, 3),
        )
        self.shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        return self.shortcut(x) + self.residual(x, memory)


class Attention(nn.Module):
    """Single-head attention among the positions of one frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels, ones=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _, height, width = x.shape
        frames = x.transpose(1, 2).flatten(0, 1)  # [B*T, C, H, W]
        query, key, value = self.to_qkv(self.norm(frames)).flatten(2).mT.chunk(3, dim=-1)  # [B*T, H*W, C]
        mixed = F.scaled_dot_product_attention(query, key, value).mT.unflatten(-1, (height, width))
        return x + self.proj(mixed).unflatten(0, (batch, -1)).transpose(1, 2)


def _each_frame(layers: nn.Module, x: Tensor) -> Tensor:
    """Runs 2D layers on every frame of x [B, C, T, H, W]."""
    return layers(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Halves height and width and, if asked, the frames: 1 + 2k become 1 + k, frame 0 by itself."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        x = _each_frame(self.resample, x)
        if self.time_conv is None or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)  # frame k sees input frames 2k-2 to 2k


class Upsample(nn.Module):
    """Doubles height and width, halves the channels and, if asked, doubles all frames but the video's first."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels // 2, 3, padding=1))
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        if self.time_conv is not None:
            first = 1 if memory is None or self not in memory else 0
            if memory is not None:
                memory[self] = True
            lone, rest = x[:, :, :first], x[:, :, first:]
            if rest.shape[2]:
                pairs = self.time_conv(rest, memory).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
                rest = pairs.movedim(1, 3).flatten(2, 3)
            x = torch.cat([lone, rest], dim=2)
        return _each_frame(self.resample, x)


def _middle(channels: int) -> Chain:
    return Chain(Residual(channels, channels), Attention(channels), Residual(channels, channels))


def _head(inputs: int, outputs: int) -> Chain:
    return Chain(Norm(inputs), nn.SiLU(), CausalConv3d(inputs, outputs, 3))


class Encoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        channels = width
        self.conv1 = CausalConv3d(3, channels, 3)
        layers: list[nn.Module] = []
        for level, widening in enumerate(WIDENING):
            for _ in range(BLOCKS):
                layers.append(Residual(channels, width * widening))
                channels = width * widening
            if level < len(SHRINKS_TIME):
                layers.append(Downsample(channels, SHRINKS_TIME[level]))
        self.downsamples = Chain(*layers)
        self.middle = _middle(channels)
        self.head = _head(channels, 2 * LATENT_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        channels = width * WIDENING[-1]
        self.conv1 = CausalConv3d(LATENT_CHANNELS, channels, 3)
        self.middle = _middle(channels)
        layers: list[nn.Module] = []
        for level, widening in enumerate(reversed(WIDENING)):
            for _ in range(BLOCKS + 1):
                layers.append(Residual(channels, width * widening))
                channels = width * widening
            if level < len(SHRINKS_TIME):
                layers.append(Upsample(channels, SHRINKS_TIME[::-1][level]))
                channels //= 2
        self.upsamples = Chain(*layers)
        self.head = _head(channels, 3)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(x, memory), memory), memory), memory)


class WanVAE(nn.Module):
    """Encoder and decoder with the keys and shapes of a Wan 2.1 VAE checkpoint.

    Args:
        width: channels at full resolution; Wan 2.1 itself has 96.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 8):
        super().__init__()
        self.encoder = Encoder(width)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)  # mean and log variance
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder(width)
        self.register_buffer("mean", torch.tensor(WAN_21_MEAN).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(WAN_21_STD).view(-1, 1, 1, 1), persistent=False)

    def encode(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, 1 + 4k, 8h, 8w] in [-1, 1] to raw latents [B, 16, 1 + k, h, w]: the distribution's mean.

        Raises:
            ValueError: the number of frames is not 1 + 4k, or a side is not a multiple of 8.
        """
        frames, height, width = video.shape[2:]
        if frames % 4 != 1 or height % 8 or width % 8:
            raise ValueError(
                f"The VAE takes 1 + 4k frames with sides that are multiples of 8, got {frames} frames of "
                f"{height} x {width}. Cut or pad the video first."
            )
        return self.conv1(self.encoder(video))[:, :LATENT_CHANNELS]

    def decode(self, latent: Tensor, memory: Memory | None = None) -> Tensor:
        """Raw latents [B, 16, T, h, w] to pixels of about [-1, 1], not clamped.

        Args:
            latent: a whole video, or with `memory` its next chunk.
            memory: carries a stream on; starts empty. Chunk by chunk gives what the whole would have given.

        Returns:
            [B, 3, 4T - 3, 8h, 8w] for a whole video or the first chunk, [B, 3, 4T, 8h, 8w] for later chunks.
        """
        if memory is None and latent.device.type == "cpu" and not torch.is_grad_enabled():
            memory = Memory()
            return torch.cat([self.decode(part, memory) for part in latent.split(AT_ONCE, dim=2)], dim=2)
        return self.decoder(self.conv2(latent), memory)

    def encode_normalised(self, video: Tensor) -> Tensor:
        """As `encode`, but to the latents that the diffusion network sees."""
        return (self.encode(video) - self.mean) / self.std

    def decode_normalised(self, latent: Tensor, memory: Memory | None = None) -> Tensor:
        """As `decode`, but from the latents that the diffusion network sees."""
        return self.decode(latent * self.std + self.mean, memory)


def load_vae(path: str | Path = SHIPPED) -> WanVAE:
    """Loads a VAE file at its own width, in float32, ready for use.

    Raises:
        RuntimeError: the file's keys or shapes are not those of a Wan 2.1 VAE.
    """
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    if "decoder.head.0.gamma" not in state:
        raise RuntimeError(f"{path} is no Wan 2.1 VAE: it has no decoder.head.0.gamma. Choose another file.")
    vae = WanVAE(width=len(state["decoder.head.0.gamma"]))
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)
