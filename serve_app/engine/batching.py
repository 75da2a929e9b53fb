"""Planning: which rows share the next forward.

The unit of planning is a *candidate*: one picture that waits for a model evaluation, one or two rows wide. Candidates
of one group fit into one forward; groups take turns. Pure functions over numbers: no torch, no state.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """What rows must have in common to share a forward."""

    model: str
    """Identity of the base model's weights."""
    height: int
    width: int
    """Latent cells, not pixels."""
    tokens: int
    """Length of the text embedding; a long prompt has a multiple of the usual 77."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One picture that waits for its next evaluation."""

    group: Group
    rows: int
    served: int
    """The turn in which it was last served, or in which it joined: the smaller, the longer it waits."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The size of one forward at most."""

    max_rows: int
    max_latent_area: int
    """Rows x latent height x latent width."""

    def rows(self, height: int, width: int) -> int:
        """How many rows of ``height`` x ``width`` latent cells fit into one forward; may be 0."""
        return min(self.max_rows, self.max_latent_area // (height * width))


def plan(candidates: Sequence[Candidate], budget: Budget) -> tuple[int, ...]:
    """Indices of the candidates that share the next forward, the longest waiting first.

    The candidate that waits longest picks the group; the group's others fill the forward in the order of their
    waiting. Every turn therefore serves the head of one queue that all groups share, and whoever is served goes to
    its end: a candidate waits at most as many turns as there were candidates ahead of it, whatever joins later, and
    every picture advances at the same rate, be its group large or small.

    A candidate wider than the budget is never planned: refuse it before it joins.
    """
    queue = sorted(
        (
            index
            for index, candidate in enumerate(candidates)
            if candidate.rows <= budget.rows(candidate.group.height, candidate.group.width)
        ),
        key=lambda index: (candidates[index].served, index),
    )
    if not queue:
        return ()
    group = candidates[queue[0]].group
    room = budget.rows(group.height, group.width)
    chosen = []
    for index in queue:
        candidate = candidates[index]
        if candidate.group == group and candidate.rows <= room:
            chosen.append(index)
            room -= candidate.rows
    return tuple(chosen)
