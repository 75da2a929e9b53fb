"""Planning: which rows share the next forward.

The unit of planning is a *candidate*: one picture that waits for a model evaluation, one or two rows wide. Candidates
of one group fit into one forward; groups take turns. Numbers only: no torch, no clock on the wall.

**Between groups** the device's work is shared by self-clocked fair queueing (Golestani, "A self-clocked fair queueing
scheme for broadband applications", INFOCOM 1994). A forward's work is ``Budget.cost``: its rows' latent area and a
constant. A group's weight is the square root of the pictures that wait in it, between an equal share for each group
(which starves crowds) and for each picture (which starves strangers); ``benchmarks/simulator.py`` compares them. There
is a virtual clock. The *tag* of a group's next forward is the clock when the group was last served, or became busy,
plus the forward's work by the group's weight. The smallest tag is served, and the clock moves on to it. So a group that
was idle has saved nothing and owes nothing, large latents pay for their size, and what is cheap need not wait long.

- *Shares.* While two groups stay busy with crowds of constant size, their work by weight differs by ``C / w + C' / w'``
  at most, the work of one forward of each.
- *Wait.* Between two forwards of a busy group, whose own cost ``c`` at most, the others get ``(n - 1) (C + W c)`` work
  at most: ``n`` groups are busy at once at most, ``C`` is the largest forward of any, ``W`` the largest weight. This
  holds whatever joins, leaves or is cancelled meanwhile, and however many groups come and go.
  For: when the group is served, at the clock's value ``v``, its next tag is ``v + c`` at most, and only tags up to that
  go before it. Of each other group that is busy then, one forward may have a tag that began before ``v``; its work is
  ``C`` at most. All others, those of newcomers too, begin at the clock's value of their time and end at their tag. For
  one group these are disjoint stretches between ``v`` and ``v + c``, each as long as its work by its weight, and at any
  value of the clock no more than ``n - 1`` groups are there to cover it.

**Within a group** the longest waiting go first, and whoever is served goes to the end. A forward with room for ``r``
rows takes ``r // 2`` pictures from the head at least, and one in any case, so a picture with ``p`` others of its group
ahead of it is in one of the next ``p // max(1, r // 2) + 1`` forwards of its group.

``tests/engine/test_batching.py`` tests all of it on random arrivals.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

FORWARD_OVERHEAD = 4 * 64 * 64
"""What a forward costs beside its rows, in latent cells of one row. An eager step of SD 1.5 with a ControlNet starts
1136 kernels; at 5 us each that is 5.7 ms, in which an H200 at 790 TFLOP/s computes 4.1 rows of 64 x 64 cells (1.09
TFLOP each). It decides what is fair, and how far a forward is filled up in the deterministic mode; on a processor the
true figure is nearer a thousand cells."""

_USUAL_TOKENS = 77
_TOKENS_PER_CELL = 16_800
"""So many tokens double a cell's work: SD 1.5 with a ControlNet takes 266 MFLOP a cell, and 15.9 kFLOP per cell and
token in its cross-attentions (4 x width x layers, summed over the levels by their share of the cells)."""
_TOKENS_PER_OWN_CELL = 6
"""So many tokens take as long as a cell: 42 MFLOP each for keys and values, where these are not kept."""


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
    """The size of one forward."""

    max_rows: int
    max_latent_area: int
    """Rows x latent height x latent width at most."""
    deterministic: bool | int = False
    """Run every forward in one number of rows, filled up where there are fewer: see ``pinned_rows``."""

    def rows(self, height: int, width: int) -> int:
        """How many rows of ``height`` x ``width`` latent cells fit into one forward; may be 0."""
        pinned = self.pinned_rows(height, width)
        return self._room(height, width) if pinned is None else pinned

    def pinned_rows(self, height: int, width: int) -> int | None:
        """In the deterministic mode the rows of every forward of this size, whatever the load; else None.

        A row's bits depend on the number of rows beside it. Unless the configuration gives a number, it is the power
        of two whose cells cost as much as the forward's overhead, and 2 at least. With ``o`` for the overhead and ``a``
        for a row, ``b`` rows make a guided request alone ``(o + b a) / (o + 2 a)`` times as long and a row under load
        ``1 + o / (b a)`` times as dear as its work; the product of both is least at ``b a = o``. So a request alone
        takes twice as long at most, and half of a full forward is work.
        """
        if self.deterministic is False:
            return None
        wanted = self.deterministic
        if wanted is True:
            wanted = 2 ** max(1, int(math.log2(max(1.0, FORWARD_OVERHEAD / (height * width)))))
        return min(wanted, self._room(height, width))

    def cost(self, group: Group, rows: int) -> int:
        """The work of a forward of ``rows`` rows, in latent cells.

        Long texts cost, too: a token takes part in the cross-attention of every cell, and needs keys and values.
        """
        pinned = self.pinned_rows(group.height, group.width)
        area = group.height * group.width
        extra = max(0, group.tokens - _USUAL_TOKENS)
        text = area * extra // _TOKENS_PER_CELL + extra // _TOKENS_PER_OWN_CELL
        return FORWARD_OVERHEAD + (rows if pinned is None else pinned) * (area + text)

    def _room(self, height: int, width: int) -> int:
        return min(self.max_rows, self.max_latent_area // (height * width))


class _Forward(NamedTuple):
    """What a group's next forward would be."""

    group: Group
    chosen: tuple[int, ...]
    charge: float
    """Its work by the group's weight."""


class Planner:
    """Plans one forward after the other; remembers when each busy group had its turn."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._clock = 0.0
        self._since: dict[Group, float] = {}
        """The clock when each busy group was last served or became busy."""

    def plan(self, candidates: Sequence[Candidate]) -> tuple[int, ...]:
        """Indices of the candidates that share the next forward, the longest waiting first; empty where none fits.

        A candidate wider than the budget is never planned: refuse it before it joins.
        """
        forwards = [self._forward(candidates, queue) for queue in self._queues(candidates)]
        self._since = {forward.group: self._since.get(forward.group, self._clock) for forward in forwards}
        if not forwards:
            return ()
        # Of equal tags the first wins: the groups are in the order of their heads' waiting.
        served = min(forwards, key=self._tag)
        self._clock = max(self._clock, self._tag(served))
        self._since[served.group] = self._clock
        return served.chosen

    def _tag(self, forward: _Forward) -> float:
        return self._since[forward.group] + forward.charge

    def _queues(self, candidates: Sequence[Candidate]) -> Iterable[list[int]]:
        """The indices of each group's candidates, the longest waiting first; so are the groups, by their heads."""
        queues: dict[Group, list[int]] = {}
        for index in sorted(range(len(candidates)), key=lambda index: (candidates[index].served, index)):
            candidate = candidates[index]
            if candidate.rows <= self._budget.rows(candidate.group.height, candidate.group.width):
                queues.setdefault(candidate.group, []).append(index)
        return queues.values()

    def _forward(self, candidates: Sequence[Candidate], queue: Sequence[int]) -> _Forward:
        group = candidates[queue[0]].group
        size = room = self._budget.rows(group.height, group.width)
        chosen = []
        for index in queue:
            if candidates[index].rows <= room:
                chosen.append(index)
                room -= candidates[index].rows
        work = self._budget.cost(group, size - room)
        return _Forward(group, tuple(chosen), work / self.weight(len(queue)))

    def weight(self, pictures: int) -> float:
        """The share of a group in which so many pictures wait, beside that of a single one."""
        return math.sqrt(pictures)
