"""A pretended GPU: tensors without data that know their device, and a log of what a real one would have waited for.

Torch's fake tensors refuse to mix devices, as a GPU does, so one that was made on the wrong one is an error here. So is
float64 there, which Apple's and Intel's devices do not have. Numbers that are read back are made up.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
GPU = torch.device("pretended", 0)
READ_NUMBER = 0.0123  # what every number that is read back seems to be


@dataclass
class Log:
    """Attributes:
    read_backs: what made the host wait for the device: a number read, a tensor copied to the host.
    sent: operations that copied a tensor from the host to the device.
    made: bytes of every new tensor on the device.
    """

    read_backs: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    made: list[int] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    def __init__(self, log: Log):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.device == GPU for tensor in given)
        try:
            result = func(*args, **(kwargs or {}))
        except DataDependentOutputException:  # a number is read
            if on_gpu:
                self.log.read_backs.append(str(func))
            return READ_NUMBER > 0 if func is torch.ops.aten.is_nonzero.default else READ_NUMBER
        shared = {tensor.untyped_storage()._cdata for tensor in given}
        for made in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if made.untyped_storage()._cdata in shared:
                continue
            if made.device == GPU:
                if made.dtype == torch.float64:
                    raise TypeError(f"{func} makes float64 numbers, which this device has not.")
                self.log.made.append(made.nbytes)
            if on_gpu and made.device.type == "cpu":
                self.log.read_backs.append(str(func))
            if given and not on_gpu and made.device == GPU:
                self.log.sent.append(str(func))
        return result


@contextmanager
def pretended_gpu(monkeypatch):
    """Everything that is made inside is pretended; gives the log."""
    log = Log()

    def read_whole(tensor: FakeTensor) -> list[float]:  # fake tensors would read number by number
        if tensor.device == GPU:
            log.read_backs.append("a list")
        return [READ_NUMBER] * tensor.numel()

    monkeypatch.setattr(FakeTensor, "tolist", read_whole)
    with FakeTensorMode(), _Watch(log):
        yield log


def on_gpu(module: nn.Module) -> nn.Module:
    """A module that was made on the meta device, with its parameters on the pretended GPU."""
    weights = {name: torch.empty(w.shape, dtype=w.dtype, device=GPU) for name, w in module.state_dict().items()}
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()
