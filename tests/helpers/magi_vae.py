"""A small autoencoder of MAGI-1's kind with seeded weights, and a video for it."""

from flowcache_core.models.magi.vae import MagiVae, MagiVaeConfig
from tests.helpers.magi_weights import fill, normal

SIZES = {
    "embed_dim": 256, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "z_chans": 4, "video_size": 64, "video_length": 16,
    "conv_last_layer": True,
}  # fmt: skip
SETTINGS = {
    "heads": {"_class_name": "ViTVAE", "model_type": "vit", "ddconfig": SIZES | {"qkv_bias": True, "ln_in_attn": True}},
    "input": {"_class_name": "ViTVAE", "model_type": "vit", "ddconfig": SIZES},
}
VIDEO = normal("video", (1, 3, 20, 80, 104)).clamp(-1, 1)


def codec(name: str, tile: int = 64, tile_frames: int = 12) -> MagiVae:
    vae = MagiVae(MagiVaeConfig.from_upstream(SETTINGS[name]), tile=tile, tile_frames=tile_frames)
    fill(vae)
    return vae.eval()
