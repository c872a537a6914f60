"""The files that ship."""

from pathlib import Path

NETWORK_FILE = Path(__file__).with_name("network.safetensors")
VAE_FILE = Path(__file__).with_name("vae.safetensors")
