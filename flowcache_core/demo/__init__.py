"""The model that ships, and what trained it.

network = demo.load_network()
text = demo.embed_caption("a red circle and a blue square")
pixels = demo.decode(latents, chunk_frames=3)
"""

from .captions import embed_caption
from .model import decode, load_network
from .shipped import NETWORK_FILE, VAE_FILE

__all__ = ["NETWORK_FILE", "VAE_FILE", "decode", "embed_caption", "load_network"]
