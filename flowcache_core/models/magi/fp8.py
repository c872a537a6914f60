"""The quantised layers of MAGI-1's distill+quant files, run as they are stored.

Matrices stay in fp8, half the memory of bfloat16, and are widened one at a time when they are used. Inputs are
rounded to fp8 as upstream's kernel wants them, so that results are upstream's; the product itself is taken in the
network's own precision, for torch has no fp8 product for every device. That costs a copy of one matrix at a time and,
next to bfloat16 weights, one pass over the input.

Source: MAGI-1, inference/model/dit/dit_module.py (PerTensorQuantizedFp8Linear, PerChannelQuantizedFp8Linear).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn


class Fp8Linear(nn.Module):
    """A matrix with one scale, for inputs with one scale."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False, dtype=None, device=None):
        super().__init__()
        self.weight = _parameter(torch.empty(1, outputs, inputs, dtype=FP8, device=device))
        self.weight_scale = _parameter(torch.ones(1, dtype=torch.float32, device=device))
        self.input_scale = _parameter(torch.ones(inputs, dtype=torch.float32, device=device))

    @property
    def scale(self) -> Tensor:
        """What inputs are divided by, [inputs]; upstream's kernel multiplies by the first entry again."""
        return self.input_scale

    @property
    def factors(self) -> Tensor:
        """What the stored numbers of a column are multiplied by to be the matrix's own, float32 [inputs]."""
        return self.input_scale[0] * self.weight_scale[0] / self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight.to(x.device, x.dtype))

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Gives the layer's output from its own weight [1, outputs, inputs], brought to x's precision."""
        rounded = to_fp8(x, self.scale.to(x.device)).to(x.dtype)
        factor = (self.input_scale[0] * self.weight_scale[0]).to(x.device)
        return (F.linear(rounded, weight[0].to(x.dtype)).float() * factor).to(x.dtype)


class SmoothFp8Linear(Fp8Linear):
    """The same for inputs that have a scale for each channel."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False, dtype=None, device=None):
        super().__init__(inputs, outputs, device=device)
        self.input_scale = _parameter(torch.ones(1, dtype=torch.float32, device=device))
        self.smooth_scale = _parameter(torch.ones(1, inputs, dtype=torch.float32, device=device))

    @property
    def scale(self) -> Tensor:
        return self.smooth_scale[0]


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Divides x [..., inputs] by its scale [inputs], cuts to fp8's range and rounds, through bfloat16 as upstream."""
    most = torch.finfo(FP8).max
    return (x.float() / scale).clamp(-most, most).bfloat16().to(FP8)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
