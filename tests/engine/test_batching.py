import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.batching import Budget, Candidate, Group, plan

GROUPS = [Group(model, side, side, tokens) for model in ("a", "b") for side in (4, 8) for tokens in (77, 154)]
budgets = st.builds(Budget, max_rows=st.integers(2, 12), max_latent_area=st.integers(2 * 64, 12 * 64))
candidates = st.lists(
    st.builds(Candidate, group=st.sampled_from(GROUPS), rows=st.integers(1, 2), served=st.integers(0, 5)), max_size=24
)


@given(candidates, budgets)
def test_a_plan_is_one_group_within_the_budget(waiting: list[Candidate], budget: Budget) -> None:
    chosen = [waiting[index] for index in plan(waiting, budget)]
    assert bool(chosen) == bool(waiting)
    assert len({id(candidate) for candidate in chosen}) == len(chosen)
    if chosen:
        (group,) = {candidate.group for candidate in chosen}
        rows = sum(candidate.rows for candidate in chosen)
        assert rows <= budget.max_rows
        assert rows * group.height * group.width <= budget.max_latent_area


@given(candidates, budgets)
def test_a_plan_leaves_out_nobody_who_would_fit(waiting: list[Candidate], budget: Budget) -> None:
    chosen = plan(waiting, budget)
    if not chosen:
        return
    group = waiting[chosen[0]].group
    room = budget.rows(group.height, group.width) - sum(waiting[index].rows for index in chosen)
    left = [c for index, c in enumerate(waiting) if c.group == group and index not in chosen]
    assert all(candidate.rows > room for candidate in left)


@given(candidates, budgets)
def test_the_longest_waiting_is_served_first(waiting: list[Candidate], budget: Budget) -> None:
    chosen = plan(waiting, budget)
    if chosen:
        assert chosen[0] == min(range(len(waiting)), key=lambda index: (waiting[index].served, index))


@given(candidates, budgets, candidates)
def test_nobody_waits_longer_than_those_ahead(
    waiting: list[Candidate], budget: Budget, arrivals: list[Candidate]
) -> None:
    """Whatever arrives later, everybody who waits is served within as many turns as there are waiting."""
    crowd = list(waiting)
    unserved = set(range(len(waiting)))
    for turn in range(len(waiting)):
        now = 6 + turn
        for index in plan(crowd, budget):
            crowd[index] = Candidate(crowd[index].group, crowd[index].rows, now)
            unserved.discard(index)
        crowd += [Candidate(arrival.group, arrival.rows, now) for arrival in arrivals]
    assert not unserved


def test_groups_take_turns_at_the_rate_of_a_step_each() -> None:
    """Three full forwards of one group and a lonely row of another: all advance equally often."""
    budget = Budget(max_rows=4, max_latent_area=10_000)
    crowd = [Candidate(GROUPS[0], 2, 0) for _ in range(6)] + [Candidate(GROUPS[-1], 1, 0)]
    served = [0] * len(crowd)
    for turn in range(1, 41):
        for index in plan(crowd, budget):
            served[index] += 1
            crowd[index] = Candidate(crowd[index].group, crowd[index].rows, turn)
    assert max(served) - min(served) <= 1


def test_small_rows_fill_what_a_wide_one_leaves() -> None:
    waiting = [Candidate(GROUPS[0], 2, 0), Candidate(GROUPS[0], 2, 0), Candidate(GROUPS[0], 1, 1)]
    assert plan(waiting, Budget(max_rows=3, max_latent_area=10_000)) == (0, 2)


def test_what_never_fits_is_never_planned() -> None:
    waiting = [Candidate(Group("a", 100, 100, 77), 2, 0), Candidate(GROUPS[0], 1, 9)]
    assert plan(waiting, Budget(max_rows=8, max_latent_area=10_000)) == (1,)


def test_planning_needs_no_torch() -> None:
    code = "import sys, serve_app.engine.batching; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
