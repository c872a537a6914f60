"""Which attention heads each of several processes takes, and what is wasted where they do not come out even.

Two schemes. *By heads*: every process has some heads of its own; where the processes do not divide them, some have one
more and the others wait for them. *By groups*: as many groups of processes as divide both, each group has heads of its
own, and within a group each process takes the queries of some tokens: nobody waits, but a group's processes hold the
same history. The one that wastes less is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from .ranks import shares


@dataclass(frozen=True)
class HeadScheme:
    """How key heads are divided.

    Attributes:
        heads: of keys in all.
        ranks: processes.
        group: processes that hold the same heads; 1 where each has its own.
    """

    heads: int
    ranks: int
    group: int = 1

    def of(self, rank: int) -> range:
        """Key heads that a process holds the history of."""
        return shares(self.heads, self.ranks // self.group)[rank // self.group]

    def asks_for(self, rank: int) -> Sequence[int]:
        """Processes whose tokens' queries a process takes."""
        return range(rank % self.group, self.ranks, self.group)

    def answers(self, asker: int) -> Sequence[int]:
        """Processes that answer one's tokens, in the order of their heads."""
        return [rank for rank in range(self.ranks) if rank % self.group == asker % self.group]

    @property
    def wasted_time(self) -> float:
        """How much longer attention takes than if it came out even: 0.33 for a third longer."""
        return len(self.of(0)) / self.group * self.ranks / self.heads - 1

    @property
    def wasted_memory(self) -> float:
        """How much more history the fullest process holds than its even part."""
        return len(self.of(0)) * self.ranks / self.heads - 1

    @property
    def waste(self) -> float:
        """What schemes are chosen by: both."""
        return self.wasted_time + self.wasted_memory

    def text(self) -> str:
        """One line for the report; nothing where nothing is wasted."""
        if not self.waste:
            return ""
        how = "heads as evenly as they go" if self.group == 1 else f"heads in groups of {self.group} processes"
        return (
            f"{self.heads} key heads over {self.ranks} processes: {how}; attention takes {self.wasted_time:.0%} longer "
            f"and the fullest holds {self.wasted_memory:.0%} more history than if it came out even"
        )


def head_scheme(heads: int, ranks: int) -> HeadScheme:
    """Chooses the scheme that wastes less."""
    grouped = HeadScheme(heads, ranks, ranks // gcd(heads, ranks))
    if ranks > heads:  # by heads, some would have none at all
        return grouped
    return min(HeadScheme(heads, ranks), grouped, key=lambda scheme: scheme.waste)
