"""A module over a checkpoint's tensors: every name and shape is checked, nothing is copied or converted."""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from ..errors import UserError

Module = TypeVar("Module", bound=nn.Module)


def fit(module: Module, tensors: Mapping[str, Tensor], kind: str) -> Module:
    """Puts the tensors in the place of the module's parameters; mapped files stay mapped.

    Args:
        module: made on the "meta" device, so that its own parameters take no memory.
        kind: what the user is to choose instead, should they not fit.

    Raises:
        UserError: a tensor is missing, left over or of the wrong shape.
    """
    expected = {name: parameter.shape for name, parameter in module.named_parameters()}
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise UserError(
            f"The checkpoint {'lacks' if name in expected else 'also holds'} {name}; choose a whole {kind}."
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{name} is {list(tensors[name].shape)}, expected {list(shape)}; choose a sound {kind}.")
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()
