"""What each family of models is run with, where the user does not say otherwise, and where each number comes from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import nn

from ..engine.anew import Anew
from ..engine.build import Seeing
from ..engine.layers import has_stacks
from ..engine.shots import ShotRule
from ..errors import UserError
from ..settings import HELD, MAGI_PAPER_CUT, SKYREELS_PAPER_CUT, Compression, Drift, HistorySettings, Reuse, Settings
from ..solvers import noise_levels
from ..solvers.multistep import SkyReelsUniPC, UniPC
from ..solvers.one_step import Euler, Noise, Renoise, SolverFactory
from .experts import BOUNDARY, SHIFT, expert_levels
from .longvie import CHUNK_FRAMES as LONGVIE_FRAMES
from .longvie import LongVieBackbone
from .presets import PAPER_PRESETS, PRESETS
from .skyreels import POLYNOMIAL_1_3B, POLYNOMIAL_14B, SkyReelsBackbone
from .wan import Attention, WanBackbone, WholeStepsBackbone


class CausVidRenoise(Renoise):
    """CausVid's: the levels that its solver uses are the nearest of those it was trained on."""

    def __init__(self, sigmas: Sequence[float], noise: Noise):
        super().__init__(noise_levels.nearest_trained(sigmas), noise)


class KreaRenoise(Renoise):
    """Krea Realtime's: the level of its last step, which the network is told as 0, is the least it was trained on."""

    def __init__(self, sigmas: Sequence[float], noise: Noise):
        super().__init__(noise_levels.nearest_trained(sigmas, 5.0), noise)


SolverName = Literal["euler", "renoise", "causvid", "krea", "unipc", "skyreels unipc"]
SOLVERS: dict[str, SolverFactory] = {
    "euler": Euler,
    "renoise": Renoise,
    "causvid": CausVidRenoise,
    "krea": KreaRenoise,
    "unipc": UniPC,
    "skyreels unipc": SkyReelsUniPC,  # with its upstream's slip: see `multistep`
}


@dataclass(frozen=True)
class Family:
    """Recommended settings of a family.

    Attributes:
        steps, lag: of its schedule; see `schedule.ChunkSchedule`.
        chunk_frames: latent frames of a chunk.
        solver: a key of `SOLVERS`, from the number of steps.
        levels: noise levels from the number of steps.
        guidance: scale of classifier-free guidance.
        size: width and height in pixels.
        shift: that `levels` are moved towards noise by.
        source: where the numbers come from.
        fps: frames a second of its videos.
        condition: noise level at which given frames are shown.
        first_levels: noise levels of the first chunk, from the number of steps, where it takes more of them.
        attention: how chunks see each other, see `engine.build.Seeing`.
        backbone: makes what runs a network of the family, from the network, frames a second and attention.
        published: the family's own settings for a preset, from its name and the network's width, or None.
        published_cut: how the paper's presets cut a history to its budget.
        anew: what of a history is computed anew, or None.
        shots: how videos of several shots are made, or None.
        image_inside: given frames that fill no chunk are what the first one begins with; else they stand before it.
        boundary: the lowest noise level of the first of its two networks, which bring their solver along; None where
            it is one network.
    """

    steps: int
    lag: int
    chunk_frames: int
    solver: Callable[[int], SolverName]
    levels: Callable[[int], list[float]]
    guidance: float
    size: tuple[int, int]
    shift: float
    source: str
    fps: int = 16
    condition: float = 0.0
    first_levels: Callable[[int], list[float] | None] = lambda steps: None
    attention: Seeing = "causal"
    backbone: Callable[[nn.Module, int, Attention], WanBackbone] = lambda network, fps, attention: WanBackbone(
        network, attention
    )
    published: Callable[[str, int], Settings | None] = lambda preset, dim: None
    published_cut: Compression = MAGI_PAPER_CUT
    anew: Anew | None = None
    shots: ShotRule | None = None
    image_inside: bool = False
    boundary: float | None = None

    def shifted_levels(self, steps: int, shift: float) -> list[float]:
        """Gives noise levels with another shift than the family's: shifts multiply."""
        return self._shifted(self.levels(steps), shift)

    def shifted_first_levels(self, steps: int, shift: float) -> list[float] | None:
        """Gives those of the first chunk, where it takes more steps."""
        levels = self.first_levels(steps)
        return None if levels is None else self._shifted(levels, shift)

    def _shifted(self, levels: list[float], shift: float) -> list[float]:
        return [noise_levels.shifted(level, shift / self.shift) for level in levels]


def always(name: SolverName) -> Callable[[int], SolverName]:
    return lambda steps: name


def evenly(shift: float) -> Callable[[int], list[float]]:
    return partial(noise_levels.linear, shift=shift)


def causvid_steps(steps: int) -> list[float]:
    """Gives CausVid's levels: its 3 steps are taken as they are, those of its other variant are shifted."""
    return list(noise_levels.CAUSVID_3_STEPS) if steps == 3 else noise_levels.linear(steps, 8.0)


def skyreels_published(preset: str, dim: int) -> Settings | None:
    """Gives FlowCache as published for SkyReels-V2; the 1.3B and the 14B have polynomials of their own."""
    if preset not in PAPER_PRESETS:
        return None
    reuse = Drift(
        threshold=0.1 if preset == "paper slow" else 0.15,
        last=True,
        rescale=POLYNOMIAL_1_3B if dim < 3000 else POLYNOMIAL_14B,
        holds="residual",
    )
    return Settings(reuse, HELD, clean_pass=False)


FAMILIES: dict[str, Family] = {
    "demo": Family(64, 16, 3, always("euler"), noise_levels.magi, 1.0, (64, 64), 3.0, "the project's own trials"),
    "causal": Family(
        4, 4, 3, always("renoise"), evenly(5.0), 1.0, (832, 480), 5.0,
        "Self-Forcing, configs/self_forcing_dmd.yaml; Causal-Forcing, configs/causal_forcing_dmd_*.yaml",
        first_levels=lambda steps: noise_levels.linear(4, 5.0) if steps < 3 else None,
    ),
    "causvid": Family(
        3, 3, 3, always("causvid"), causvid_steps, 1.0, (832, 480), 8.0,
        "CausVid, configs/wan_causal_dmd.yaml (3 steps) and wan_causal_dmd_warp_4step_cfg2.yaml (4 steps)",
    ),
    "rolling": Family(
        5, 1, 3, always("renoise"), evenly(5.0), 1.0, (832, 480), 5.0,
        "Rolling Forcing, configs/rolling_forcing_dmd.yaml", attention="rolling",
    ),
    "longlive": Family(
        4, 4, 3, always("renoise"), evenly(5.0), 1.0, (832, 480), 5.0,
        "LongLive, configs/longlive_inference.yaml and longlive_interactive_inference.yaml", anew=Anew(12),
    ),
    "krea": Family(
        5, 5, 3, always("krea"), noise_levels.krea, 1.0, (832, 480), 5.0,
        "Krea Realtime, release_server.py (GenerateParams, keep_first_frame)", anew=Anew(3, always=True, first=1),
    ),
    "longlive 2": Family(
        4, 4, 8, always("unipc"), partial(noise_levels.skyreels, shift=5.0), 1.0, (1280, 704), 5.0,
        "LongLive 2.0, configs/inference.yaml, inference_i2v.yaml, pipeline/causal_diffusion_inference.py", fps=24,
        backbone=lambda network, fps, attention: WholeStepsBackbone(network, attention),
        shots=ShotRule(8), image_inside=True,
    ),
    "experts": Family(
        8, 8, 3, always("renoise"), expert_levels, 1.0, (832, 480), SHIFT,
        "FastVideo, SelfForcingWan2_2_T2V480PConfig and basic_self_forcing_causal_wan2_2_i2v.py", boundary=BOUNDARY,
    ),
    "skyreels": Family(
        50, 5, 5, always("skyreels unipc"), noise_levels.skyreels, 6.0, (960, 544), 8.0,
        "SkyReels-V2, README (asynchronous inference, addnoise_condition 20)", fps=24, condition=0.02,
        backbone=SkyReelsBackbone, published=skyreels_published, published_cut=SKYREELS_PAPER_CUT,
    ),
    "wan": Family(
        50, 50, 3, always("unipc"), evenly(8.0), 6.0, (832, 480), 8.0,
        "Wan 2.1, README",
    ),
    "longvie": Family(
        50, 50, LONGVIE_FRAMES, always("euler"), evenly(5.0), 5.0, (640, 352), 5.0,
        "LongVie, inference.py and diffsynth/pipelines/wan_video_new_longvie.py", attention="pictures",
        backbone=lambda network, fps, attention: LongVieBackbone(network, attention),
    ),
    **dict.fromkeys(("magi", "magi distilled"), Family(
        64, 16, 6, always("euler"), noise_levels.magi, 7.5, (720, 720), 3.0,
        "MAGI-1, example/4.5B/*_config.json; see magi.config.magi_usual",
        fps=24,
    )),
}  # fmt: skip


def solver_of(backbone: Any, name: str) -> SolverFactory:
    """Gives a solver by its name; two networks bring theirs along, for the noise level at which they change."""
    return backbone.solver if has_stacks(backbone) else SOLVERS[name]


def family(name: str) -> Family:
    """Looks a family's settings up.

    Raises:
        UserError: it cannot be run here.
    """
    if name not in FAMILIES:
        raise UserError(f"The family '{name}' is not supported here; expected one of {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def family_preset(preset: str, name: str, dim: int, history: HistorySettings) -> Settings:
    """Gives a preset as a family takes it: the paper's presets are the published settings for that family, and cut a
    history with a budget as published; one with a window in frames keeps its newest.

    Args:
        preset: a key of `presets.PRESETS`.
        dim: width of the network.
        history: of which the paper's presets replace how it is cut.
    """
    if preset in PAPER_PRESETS and history.window is None:
        history = replace(history, compression=family(name).published_cut)
    return replace(family(name).published(preset, dim) or PRESETS[preset], history=history)


def fitted(reuse: Reuse, name: str, dim: int) -> Reuse:
    """Fits a rule that watches the input to a family: with the polynomial that was fitted to its signal, and holding
    what that was fitted for. Thresholds then mean what they mean to the rule's makers.

    Args:
        reuse: any settings; those that watch nothing stay as they are.
        name: of the family.
        dim: width of the network.
    """
    published = family(name).published("paper slow", dim)
    if published is None or not isinstance(reuse, Drift) or not isinstance(published.reuse, Drift):
        return reuse
    return replace(reuse, rescale=published.reuse.rescale, holds=published.reuse.holds)
