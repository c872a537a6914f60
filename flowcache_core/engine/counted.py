"""What a run costs, for its report: operations of attention, tokens that went through layers, memory at its peak."""

import torch
from torch import Tensor

from ..history.cache import Attention
from ..report import Report


def counted(attention: Attention, report: Report) -> Attention:
    """Has a report count what an attention is asked for: queries [B, heads, Nq, D], keys and values [B, heads, Nk, D]
    of the video's tokens, once a layer for each chunk or window."""

    def counting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        report.attention_flops += 4 * q.numel() * k.shape[2]
        report.layer_tokens += q.shape[0] * q.shape[2]
        return attention(q, k, v)

    return counting


def peak_bytes(device: torch.device) -> int:
    """Says what this process had allocated on a CUDA device at most since `reset_peak`; 0 for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Begins to watch for the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
