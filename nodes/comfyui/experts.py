"""Two networks of the host as one model: which is run is said by the noise level (Wan 2.2 A14B)."""

import comfy.model_patcher

from ...flowcache_core.checkpoints import OF_TWO_NETWORKS
from ...flowcache_core.errors import UserError
from ...flowcache_core.models.longvie import leads
from .checks import check_network
from .guider import BOUNDARY, FAMILY, LOW, low_network

(EXPERTS,) = OF_TWO_NETWORKS


def two_experts(
    high: comfy.model_patcher.ModelPatcher, low: comfy.model_patcher.ModelPatcher, boundary: float
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the first model that takes the second one along; the host loads both for a run.

    Args:
        high, low: the networks for high and for low noise levels.
        boundary: the lowest noise level of the first.

    Raises:
        UserError: they are not two networks of one size that go chunk by chunk, or not two.
    """
    shapes = []
    for model in (high, low):
        network = model.model.diffusion_model
        check_network(network)
        if leads(network) or hasattr(network, "fps_embedding"):
            raise UserError("Two Experts takes the networks of Wan 2.2 A14B; load those.")
        shapes.append((network.dim, len(network.blocks), network.num_heads, network.out_dim, network.text_dim))
    if shapes[0] != shapes[1]:
        raise UserError(
            f"The networks are of other sizes, {shapes[0]} and {shapes[1]} (width, blocks, heads, channels, text "
            "width); connect the two that belong together."
        )
    if high.model is low.model:
        raise UserError("Both inputs are one model; load the second network's file too.")
    clone = high.clone()
    clone.set_additional_models(LOW, [low])
    clone.model_options.setdefault("transformer_options", {}).update({FAMILY: EXPERTS, BOUNDARY: boundary})
    return clone


def check_experts(model: comfy.model_patcher.ModelPatcher) -> None:
    """Raises UserError where a model is one of two networks, and the other one is not there."""
    family = model.model_options.get("transformer_options", {}).get(FAMILY)
    if family in OF_TWO_NETWORKS and low_network(model) is None:
        raise UserError(
            "The model is one of the two networks of Wan 2.2 A14B; load the other one too, and connect both to Two "
            "Experts (FlowCache)."
        )
