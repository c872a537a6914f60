"""Matrix products of 16-bit numbers with float32 results: what a GPU's matrix units give at the speed of 16 bit."""

import torch
from torch import Tensor


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiplies matrices exactly, as if their numbers were float32, and sums in float32.

    On CUDA devices 16-bit inputs go to the matrix units as they are (`torch.bmm` with `out_dtype`, torch 2.8 or newer);
    elsewhere they are widened first, which gives the same but for the order of the sums.

    Args:
        a: [B, n, k].
        b: [B, k, m], of the same dtype.

    Returns:
        float32 [B, n, m].
    """
    if a.dtype == torch.float32:
        return a @ b
    if _takes_16_bit(a.device.type):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _takes_16_bit(device_type: str) -> bool:
    """Whether a device has the mixed product; tensors without data stand for a CUDA device's."""
    return device_type in ("cuda", "meta") and torch.version.hip is None and hasattr(torch.ops.aten.bmm, "dtype")
