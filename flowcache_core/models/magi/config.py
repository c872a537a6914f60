"""Sizes of MAGI-1 networks: as published, or read off the weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...errors import UserError
from ...history.plan import NetworkSizes

LATENT_CHANNELS = 16  # of MAGI-1's autoencoder
DOUBLED_INPUT_SCALE = 0.1  # the published networks with doubled channels scale their input so


@dataclass(frozen=True)
class MagiConfig:
    """Sizes of a network of the MAGI-1 layout.

    Attributes:
        width, ffn_width: of the tokens and of the feed-forward's inner layer.
        heads, kv_heads, head_dim: query heads, key and value heads (a divisor of `heads`), width of each.
        doubled: the latent's channels are fed twice, and the second half of the output is dropped.
        input_scale: factor on the latent on the way in, divisor on the way out.
        gated: the feed-forward is silu(a) * b of two halves; gelu otherwise.
        condition_width: of the vector (noise level and caption kind) that makes the gates.
        caption_width, caption_tokens: of the text encoder's output.
        distilled: the network is also told how long a step is.
        fp8: all blocks but the first and last hold fp8 matrices (magi_fp8.py).
    """

    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int = 8
    head_dim: int = 128
    channels: int = 16
    doubled: bool = False
    input_scale: float = 1.0
    gated: bool = False
    caption_width: int = 4096
    caption_tokens: int = 800
    patch: int = 2
    eps: float = 1e-6
    distilled: bool = False
    fp8: bool = False

    @property
    def condition_width(self) -> int:
        return self.width // 4

    @property
    def sizes(self) -> NetworkSizes:
        """What decides how much memory a run takes."""
        # Attention's past and text, merged, projected and gated in float32, need more than the feed-forward.
        inside = self.ffn_width * (2 if self.gated else 1) + 13 * self.width
        texts = 2 * self.layers * self.kv_heads * self.head_dim
        return NetworkSizes(
            self.layers, self.heads, self.kv_heads, self.head_dim, self.width, inside, texts, self.caption_tokens
        )

    @property
    def fed_channels(self) -> int:
        return self.channels * (2 if self.doubled else 1)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], distilled: bool) -> "MagiConfig":
        """Reads the sizes off a checkpoint's tensors under upstream's names.

        Args:
            distilled: whether the network is told the step size; base and distilled files have the same tensors.

        Raises:
            UserError: tensors are missing, or it is not of the MAGI-1 layout.
        """
        block = "videodit_blocks.layers.0."
        names = {
            "embedder": "x_embedder.weight",
            "caption": "y_embedder.null_caption_embedding",
            "inner": block + "mlp.linear_fc1.weight",
            "outer": block + "mlp.linear_fc2.weight",
            "head": block + "self_attention.q_layernorm.weight",
            "q": block + "self_attention.linear_qkv.q.weight",
            "k": block + "self_attention.linear_qkv.k.weight",
        }
        missing = [name for name in names.values() if name not in tensors]
        if missing:
            raise UserError(f"The checkpoint lacks {missing[0]}; expected MAGI-1's tensors: choose another file.")
        shape = {key: tuple(tensors[name].shape) for key, name in names.items()}
        dimensions = {"embedder": 5, "head": 1}
        for key, name in names.items():
            if len(shape[key]) < dimensions.get(key, 2) or 0 in shape[key]:
                raise UserError(f"{name} is {list(shape[key])}, which no MAGI-1 has; choose a sound checkpoint.")
        width, fed, _, patch, _ = shape["embedder"]
        # fp8 matrices carry a leading 1
        (queries, _), (keys, _), (inner, _) = shape["q"][-2:], shape["k"][-2:], shape["inner"][-2:]
        doubled = fed == 2 * LATENT_CHANNELS
        return cls(
            layers=len({name.split(".")[2] for name in tensors if name.startswith("videodit_blocks.layers.")}),
            width=width,
            ffn_width=shape["outer"][-1],
            heads=queries // shape["head"][0],
            kv_heads=keys // shape["head"][0],
            head_dim=shape["head"][0],
            channels=fed // (2 if doubled else 1),
            doubled=doubled,
            input_scale=DOUBLED_INPUT_SCALE if doubled else 1.0,
            gated=inner == 2 * shape["outer"][-1],
            caption_width=shape["caption"][1],
            caption_tokens=shape["caption"][0],
            patch=patch,
            distilled=distilled,
            fp8=any(name.endswith("linear_qkv.q.weight_scale") for name in tensors),
        )


MAGI_4_5B = MagiConfig(layers=34, width=3072, ffn_width=12288, heads=24)
MAGI_24B = MagiConfig(layers=48, width=6144, ffn_width=16384, heads=48, doubled=True, input_scale=0.1, gated=True)


def magi_usual(config: MagiConfig) -> tuple[int, tuple[int, int]]:
    """Gives the steps and the size in pixels that a MAGI-1 network is published with (example/*/*_config.json)."""
    if config.gated:  # 24B
        return 16 if config.distilled else 32, (1280, 720)
    return 64, (720, 720)
