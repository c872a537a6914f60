"""Branches of guidance divided among groups of processes: each runs its own, and only velocities are exchanged."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..engine.forward import Step
from ..engine.guidance import Network, WeightedGuidance
from ..schedule import Given
from .pipeline import summed
from .ranks import Ranks


class DividedBranches:
    """Guidance of which this process runs some branches.

    Args:
        guidance: of the run.
        peers: the processes that have the same part of the other branches, one for each group.
    """

    def __init__(self, guidance: WeightedGuidance, peers: Ranks):
        self.guidance, self.peers = guidance, peers
        self.at_once = guidance.at_once
        every = list(guidance.texts)
        self.of_group = [every[group :: peers.size] for group in range(peers.size)]
        self.texts = {name: guidance.texts[name] for name in self.of_group[peers.rank]}

    def mix(self, step: Step) -> Hashable:
        """Names the sum of branches that it takes at a step."""
        return self.guidance.mix(step)

    def texts_of(self, chunk: int | Given) -> list[Tensor]:
        """Gives all that a chunk is shown, in all branches."""
        return self.guidance.texts_of(chunk)

    def velocities(self, steps: Sequence[Step], network: Network) -> tuple[list[Tensor], tuple[Hashable, ...]]:
        """Runs this process's branches of all steps, and gets the others'."""
        every, mine = list(self.guidance.texts), tuple(self.texts)
        asked = [step._replace(x=torch.cat([step.x] * len(mine))) for step in steps] if len(mine) > 1 else steps
        numbers = [every.index(name) for name in mine]
        results = network(asked, mine, lambda chunk: [self.guidance.texts_of(chunk)[number] for number in numbers])
        packed = torch.cat([result.reshape(-1) for result in results])
        counts = [sum(step.x.numel() for step in steps) * len(names) for names in self.of_group]
        parts = self.peers.gather(packed, [(count,) for count in counts])
        by_branch: dict[Hashable, list[Tensor]] = {name: [] for name in every}
        for names, part in zip(self.of_group, parts, strict=True):
            pieces = part.split([step.x.numel() * len(names) for step in steps])
            for step, piece in zip(steps, pieces, strict=True):
                for name, value in zip(names, piece.view(len(names), *step.x.shape), strict=True):
                    by_branch[name].append(value)
        return summed(self.guidance, steps, [by_branch[name] for name in every]), tuple(every)
