"""Teacher-forced runs: every chunk is denoised over the plain run's keys and values of the same tick.

In a free run a small difference may grow from chunk to chunk until two clips have parted; their likeness then says when
they parted, not how good the method is. Teacher-forced, a chunk's error is its own. That is blind to what adds up from
chunk to chunk, so free runs always stand beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.causal import CausalForward
from ..engine.forward import Step, Velocity
from ..engine.guidance import classifier_free
from ..engine.loop import Engine
from ..models.wan import Attention
from ..schedule import ChunkSchedule, Given
from .runs import Clips, Method, chunk_tokens, run_settings
from .setups import Setup


@dataclass
class Teacher:
    """The plain run, step by step, as it goes by. Where the unaccelerated window keeps no history, the run over one
    teaches: it gives the same.

    Attributes:
        steps: of a chunk.
        inputs: latents [clips, C, T, h, w] before each step, by chunk and step.
        chunks: finished, each [clips, C, T, h, w].
    """

    steps: int
    inputs: dict[tuple[int | Given, int | None], Tensor] = field(default_factory=dict)
    chunks: dict[int, Tensor] = field(default_factory=dict)

    def watch(self, engine: Engine) -> None:
        """Learns from a run that is about to begin."""
        forward = engine.forward
        ask, finish = forward.velocities, forward.finish

        def velocities(steps: Sequence[Step]) -> list[Velocity]:
            self.inputs |= {(step.place.chunk, step.place.step): step.x for step in steps}
            return ask(steps)

        def finished(chunk: int, latent: Tensor) -> None:
            self.chunks[chunk] = latent
            finish(chunk, latent)

        vars(forward).update(velocities=velocities, finish=finished)


class TaughtForward(CausalForward):
    """Runs the teacher's chunks and the method's as two halves of a batch. The method's half sees the teacher's keys
    and values, but for the chunk's own."""

    def __init__(self, *causal, teacher: Teacher, schedule: ChunkSchedule, levels: Sequence[float], **more):
        super().__init__(*causal, **more)
        self.teacher, self.schedule, self.levels = teacher, schedule, levels

    def velocities(self, steps: Sequence[Step]) -> list[Velocity]:
        """Runs all active chunks of the tick, whose keys are seen, and answers for those that are asked for."""
        asked = {step.place.chunk: step for step in steps}
        both, stride = [], self.teacher.steps // self.schedule.steps
        for place in self.schedule.active(steps[0].place.tick):
            assert place.step is not None
            known = self.teacher.inputs[place.chunk, place.step * stride]
            step = asked.get(place.chunk, Step(known, self.levels[place.step], place))
            both.append(step._replace(x=torch.cat([known, step.x]), recompute=True))
        answers = zip(both, super().velocities(both), strict=True)
        return [
            answer._replace(value=answer.value.chunk(2)[1]) for step, answer in answers if step.place.chunk in asked
        ]

    def finish(self, chunk: int, latent: Tensor) -> None:
        """Takes the teacher's chunk in place of the method's."""
        super().finish(chunk, torch.cat([self.teacher.chunks[chunk]] * 2))


def can_be_taught(method: Method, setup: Setup) -> bool:
    """Whether a method goes through noise levels of the plain run alone, and holds nothing of the network's inside."""
    return setup.steps % (method.steps or setup.steps) == 0 and not method.settings.holds_residual


def taught(method: Method, setup: Setup, clips: Clips, teacher: Teacher) -> Tensor:
    """Runs a method that can be taught: latents [clips, C, T, h, w]."""
    run = run_settings(method, setup, clips)
    doubled = replace(
        run,
        guidance=classifier_free(torch.cat([clips.text] * 2)),
        shape=(2 * run.shape[0], *run.shape[1:]),
        attention=over_the_teachers_keys(chunk_tokens(clips.backbone)),
    )
    make = partial(TaughtForward, teacher=teacher, schedule=run.schedule, levels=run.sampling.sigmas)
    return torch.cat([chunk.latent for chunk in method.build(doubled, make).run()], dim=2)


def over_the_teachers_keys(tokens: int) -> Attention:
    """Attention of a batch whose second half sees the first half's keys and values, but for its own last `tokens`."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (k, own_k), (v, own_v) = k.chunk(2), v.chunk(2)
        k, v = (
            torch.cat([known, torch.cat([known[:, :, :-tokens], own[:, :, -tokens:]], dim=2)])
            for known, own in ((k, own_k), (v, own_v))
        )
        return F.scaled_dot_product_attention(q, k, v)

    return attention
