"""The files that ship."""

from pathlib import Path

NETWORK_FILE = Path(__file__).with_name("network.safetensors")
VAE_FILE = Path(__file__).with_name("vae.safetensors")
LAYOUT = "WanModel 256x8 heads 4"  # what a state says of the network, wherever it was loaded
EDITION = 2  # of the weights; states of the first one's runs go on in no other


def named(layout: str) -> str:
    """What a state says that it was made with: the demo network's weights change with releases, so it is told apart by
    more than its size."""
    return f"{layout}, demo {EDITION}" if layout == LAYOUT else layout
