import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.batching import FORWARD_OVERHEAD, Budget, Candidate, Group, Planner

GROUPS = [Group(model, side, side, tokens) for model in ("a", "b") for side in (4, 128) for tokens in (77, 154)]
AREA = 128 * 128
WIDE = Budget(8, 8 * AREA)
budgets = st.builds(
    Budget,
    max_rows=st.integers(2, 12),
    max_latent_area=st.integers(2 * AREA, 12 * AREA),
    deterministic=st.sampled_from([False, True, 2, 5]),
)
candidates = st.lists(
    st.builds(Candidate, group=st.sampled_from(GROUPS), rows=st.integers(1, 2), served=st.integers(0, 5)), max_size=24
)


@dataclass
class Crowd:
    """Pictures that come, are served for ever, and go: what the engine does with a plan, and what came of it."""

    budget: Budget
    waiting: list[Candidate] = field(default_factory=list)
    turn: int = 0
    work: dict[Group, int] = field(default_factory=dict)
    """What each group has got so far."""

    def __post_init__(self) -> None:
        self.planner = Planner(self.budget)

    def join(self, group: Group, rows: int) -> None:
        self.waiting.append(Candidate(group, rows, self.turn))

    def step(self) -> list[int]:
        """One forward; the places of those it served."""
        self.turn += 1
        chosen = list(self.planner.plan(self.waiting))
        if chosen:
            group = self.waiting[chosen[0]].group
            cost = self.budget.cost(group, sum(self.waiting[index].rows for index in chosen))
            self.work[group] = self.work.get(group, 0) + cost
        for index in chosen:
            self.waiting[index] = Candidate(self.waiting[index].group, self.waiting[index].rows, self.turn)
        return chosen

    def largest(self, group: Group) -> int:
        """The most that a forward of a group can cost."""
        return self.budget.cost(group, self.budget.rows(group.height, group.width))


@given(candidates, budgets)
def test_a_plan_is_one_group_within_the_budget(waiting: list[Candidate], budget: Budget) -> None:
    chosen = [waiting[index] for index in Planner(budget).plan(waiting)]
    assert bool(chosen) == bool(waiting)
    assert len({id(candidate) for candidate in chosen}) == len(chosen)
    if chosen:
        (group,) = {candidate.group for candidate in chosen}
        rows = budget.pinned_rows(group.height, group.width) or sum(candidate.rows for candidate in chosen)
        assert sum(candidate.rows for candidate in chosen) <= rows <= budget.max_rows
        assert rows * group.height * group.width <= budget.max_latent_area


@given(candidates, budgets)
def test_a_plan_leaves_out_nobody_who_would_fit(waiting: list[Candidate], budget: Budget) -> None:
    chosen = Planner(budget).plan(waiting)
    if not chosen:
        return
    group = waiting[chosen[0]].group
    room = budget.rows(group.height, group.width) - sum(waiting[index].rows for index in chosen)
    left = [c for index, c in enumerate(waiting) if c.group == group and index not in chosen]
    assert all(candidate.rows > room for candidate in left)


@given(candidates, budgets)
def test_within_a_group_the_longest_waiting_is_served_first(waiting: list[Candidate], budget: Budget) -> None:
    chosen = Planner(budget).plan(waiting)
    if chosen:
        same = [index for index, candidate in enumerate(waiting) if candidate.group == waiting[chosen[0]].group]
        assert chosen[0] == min(same, key=lambda index: (waiting[index].served, index))


events = st.one_of(
    st.just("step"),
    st.just("step"),
    st.tuples(st.sampled_from(GROUPS), st.integers(1, 2)),
    st.integers(0, 23).map(float),  # the place of one who leaves
)


@given(st.lists(events, max_size=120), budgets)
def test_no_group_waits_longer_than_the_bound(story: Sequence[object], budget: Budget) -> None:
    """The module's docstring, *Wait*: others get (n - 1) (C + W c) work at most between two forwards of a group."""
    crowd = Crowd(budget)
    since: dict[Group, int] = {}
    """What all groups had got when a busy group was last served, or became busy."""
    peak, weight, worst = 1, 1.0, dict.fromkeys(GROUPS, 0)
    for event in [*story, *["step"] * 30]:
        if isinstance(event, tuple):
            crowd.join(*event)
        elif isinstance(event, float):
            del crowd.waiting[int(event) : int(event) + 1]
        else:
            busy = {candidate.group for candidate in crowd.waiting}
            sizes = [sum(candidate.group == group for candidate in crowd.waiting) for group in busy]
            peak, weight = max(peak, len(busy)), max(weight, *map(math.sqrt, sizes), 0)
            before = sum(crowd.work.values())
            since = {group: since.get(group, before) for group in busy}
            chosen = crowd.step()
            if chosen:
                served = crowd.waiting[chosen[0]].group
                worst[served] = max(worst[served], before - since[served])
                since[served] = sum(crowd.work.values())
            for group in busy - {crowd.waiting[index].group for index in chosen[:1]}:
                worst[group] = max(worst[group], before - since[group])
        since = {group: at for group, at in since.items() if group in {one.group for one in crowd.waiting}}
    largest = max(map(crowd.largest, GROUPS))
    for group in GROUPS:
        assert worst[group] <= (peak - 1) * (largest + weight * crowd.largest(group)) + 1


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 2)), min_size=1, max_size=24), budgets)
def test_no_picture_waits_longer_than_those_ahead_of_it_in_its_group(
    crowded: list[tuple[int, int]], budget: Budget
) -> None:
    crowd = Crowd(budget)
    for number, rows in crowded:
        crowd.join(GROUPS[number], rows)
    ahead = [[c.group for c in crowd.waiting[:place]].count(one.group) for place, one in enumerate(crowd.waiting)]
    unserved, forwards = set(range(len(crowd.waiting))), dict.fromkeys(GROUPS, 0)
    for _ in range(1000):
        chosen = crowd.step()
        group = crowd.waiting[chosen[0]].group
        forwards[group] += 1
        head = max(1, budget.rows(group.height, group.width) // 2)
        for place in unserved & set(chosen):
            assert forwards[group] <= ahead[place] // head + 1
        unserved -= set(chosen)
        if not unserved:
            return
        crowd.join(GROUPS[crowd.turn % len(GROUPS)], 2)  # whoever comes later changes nothing
    raise AssertionError("somebody was never served")


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 2)), min_size=1, max_size=24), budgets)
def test_busy_groups_get_work_by_the_root_of_their_crowds(crowded: list[tuple[int, int]], budget: Budget) -> None:
    """The module's docstring, *Shares*: by weight, they differ by one forward of each at most."""
    crowd = Crowd(budget)
    for number, rows in crowded:
        crowd.join(GROUPS[number], rows)
    busy = {candidate.group for candidate in crowd.waiting}
    root = {group: math.sqrt(sum(c.group == group for c in crowd.waiting)) for group in busy}
    for _ in range(60):
        crowd.step()
        for one in busy:
            for other in busy:
                apart = crowd.work.get(one, 0) / root[one] - crowd.work.get(other, 0) / root[other]
                assert apart <= crowd.largest(one) / root[one] + crowd.largest(other) / root[other] + 1


def test_a_stranger_in_a_flood_gets_more_than_its_head_count() -> None:
    """Sixteen of one kind and one of another: a fifth of the work, not a seventeenth."""
    crowd = Crowd(WIDE)
    for _ in range(16):
        crowd.join(GROUPS[0], 2)
    crowd.join(GROUPS[1], 2)
    for _ in range(500):
        crowd.step()
    assert crowd.work[GROUPS[1]] / sum(crowd.work.values()) == pytest.approx(1 / 5, abs=0.01)


def test_who_was_idle_has_saved_nothing() -> None:
    """A group that comes back gets no more than its share from then on."""
    crowd = Crowd(WIDE)
    crowd.join(GROUPS[0], 2)
    for _ in range(100):
        crowd.step()
    crowd.join(GROUPS[1], 2)
    turns = [crowd.waiting[crowd.step()[0]].group for _ in range(8)]
    assert turns.count(GROUPS[1]) == 4


def test_newcomers_without_end_do_not_starve_a_large_forward() -> None:
    """There is always a group that was never served before, and two of them are there at once."""
    crowd = Crowd(WIDE)
    crowd.join(GROUPS[2], 2)
    for number in range(100):
        crowd.join(Group(f"new-{number}", 4, 4, 77), 1)
        if 0 in crowd.step():
            return
        crowd.waiting = [crowd.waiting[0], *crowd.waiting[-1:]]
    raise AssertionError("the large one was never served")


def test_small_rows_fill_what_a_wide_one_leaves() -> None:
    waiting = [Candidate(GROUPS[0], 2, 0), Candidate(GROUPS[0], 2, 0), Candidate(GROUPS[0], 1, 1)]
    assert Planner(Budget(max_rows=3, max_latent_area=10_000)).plan(waiting) == (0, 2)


def test_what_never_fits_is_never_planned() -> None:
    waiting = [Candidate(Group("a", 100, 100, 77), 2, 0), Candidate(GROUPS[0], 1, 9)]
    assert Planner(Budget(max_rows=8, max_latent_area=10_000)).plan(waiting) == (1,)


@pytest.mark.parametrize(
    ("side", "rows"), [(8, 16), (32, 16), (48, 4), (64, 4), (96, 2), (128, 2), (512, 1), (1024, 0)]
)
def test_pinned_rows_depend_on_the_size_alone(side: int, rows: int) -> None:
    """Their cells cost about one overhead; two rows at least, and never more than fit."""
    budget = Budget(16, 2**18, deterministic=True)
    assert budget.pinned_rows(side, side) == budget.rows(side, side) == rows
    if rows > 2:
        assert rows * side * side <= FORWARD_OVERHEAD


def test_pinned_rows_can_be_configured_and_fit_all_the_same() -> None:
    budget = Budget(16, 6 * AREA, deterministic=8)
    assert [budget.pinned_rows(side, side) for side in (8, 64, 128)] == [8, 8, 6]
    assert Budget(16, 6 * AREA).pinned_rows(8, 8) is None
    group = Group("a", 64, 64, 77)
    assert budget.cost(group, 1) == budget.cost(group, 8) == FORWARD_OVERHEAD + 8 * 64 * 64


def test_planning_needs_no_torch() -> None:
    code = "import sys, serve_app.engine.batching; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
