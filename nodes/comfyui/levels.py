"""Which noise levels a run takes: the user's shift, a patch of the model, or the family's."""

from dataclasses import dataclass

import comfy.model_patcher
import comfy.model_sampling

from ...flowcache_core.errors import UserError
from ...flowcache_core.models.families import Family

PATCH = "model_sampling"  # the host's key of what ModelSamplingSD3 and its kin hang on a model
NO_EFFECT = "ModelSamplingSD3 and its kin have no effect on MAGI-1, whose noise levels are its own"
MULTIPLIER = 1000  # of a noise level, to the time-step that a network of the Wan layout is told


@dataclass(frozen=True)
class Levels:
    """Noise levels of a run.

    Attributes:
        each: of a chunk, [steps + 1].
        first: of the first chunk where it takes more steps, else None.
        notes: lines for the report: the shift and who set it, and what of a patch is not heeded.
    """

    each: list[float]
    first: list[float] | None
    notes: list[str]


def chosen_levels(model: comfy.model_patcher.ModelPatcher, usual: Family, steps: int, shift: float) -> Levels:
    """Gives a family's levels at the shift that holds: the user's above 0, else that of a patch, else the family's.

    Raises:
        UserError: the model is patched to be sampled as no flow.
    """
    patch = model.object_patches.get(PATCH)
    patched = None if patch is None else patched_shift(patch)
    if shift:
        source = f"shift {shift:g}, as set" + (f" (the model's sampling patch says {patched:g})" if patched else "")
    elif patched:
        shift, source = patched, f"shift {patched:g}, from the model's sampling patch"
    else:
        return Levels(usual.levels(steps), usual.first_levels(steps), [f"shift {usual.shift:g}, the family's"])
    notes = [source, *([] if patch is None else time_step_note(patch))]
    return Levels(usual.shifted_levels(steps, shift), usual.shifted_first_levels(steps, shift), notes)


def fixed_levels(model: comfy.model_patcher.ModelPatcher) -> list[str]:
    """Says for the report that a sampling patch has no effect, on a model whose levels are its own."""
    return [NO_EFFECT] if PATCH in model.object_patches else []


def patched_shift(sampling) -> float:
    """The shift of a sampling patch, by what its schedule makes of the middle.

    Raises:
        UserError: the patch is for no flow.
    """
    check_flow(sampling)
    middle = float(sampling.percent_to_sigma(0.5))
    return middle / (1 - middle)


def check_flow(sampling) -> None:
    """Raises UserError for a `model_sampling` that is for no flow: what the model gives would be taken for something
    else."""
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise UserError(
            "The model is patched to be sampled as no flow (ModelSamplingDiscrete or its kin), and AR video models are "
            "flows; remove that node, or use ModelSamplingSD3."
        )


def time_step_note(sampling) -> list[str]:
    """Says for the report what of a sampling patch is not heeded: another scale of the time-steps."""
    multiplier = float(sampling.timestep(1.0))
    if multiplier == MULTIPLIER:
        return []
    return [
        f"the model's sampling patch names time-steps from 0 to {multiplier:g}, and the network was trained on 0 to "
        f"{MULTIPLIER}: those are kept; ModelSamplingSD3 sets the shift alone"
    ]
