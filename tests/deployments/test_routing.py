"""The routing policy on its own, without Ray: what 24 requests do on several replicas."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.routing import COLD_COST, Candidate, Group, Placements, group_of, rank
from serve_app.tasks import AttemptRef, GenerationTask


def play(groups: list[Group], replicas: int) -> tuple[Counter[str], dict[Group, set[str]]]:
    """Send one request per entry of ``groups``; none of them ends."""
    placements = Placements()
    loads: Counter[str] = Counter({f"r{n}": 0 for n in range(replicas)})
    homes: dict[Group, set[str]] = {}
    for group in groups:
        best = rank(placements.candidates(group, sorted(loads.items())))[0]
        loads[best] += 1
        placements.record(group, best)
        homes.setdefault(group, set()).add(best)
    return loads, homes


def test_interleaved_groups_get_a_replica_each() -> None:
    groups = [("sd", size, size) for size in (256, 512, 768)]
    loads, homes = play(groups * 8, 3)
    assert sorted(loads.values()) == [8, 8, 8]
    assert sorted(len(replicas) for replicas in homes.values()) == [1, 1, 1]


def test_a_hot_group_spreads() -> None:
    loads, _ = play([("sd", 512, 512)] * 24, 2)
    assert max(loads.values()) <= 2 * min(loads.values())


def test_a_small_group_stays_together() -> None:
    loads, _ = play([("sd", 512, 512)] * COLD_COST, 4)
    assert sorted(loads.values()) == [0, 0, 0, COLD_COST]


@given(
    st.lists(
        st.builds(
            Candidate,
            id=st.uuids().map(str),
            load=st.integers(0, 100),
            warm=st.booleans(),
            groups=st.integers(0, 10),
        ),
        unique_by=lambda candidate: candidate.id,
    )
)
def test_rank_keeps_every_candidate_and_never_prefers_a_far_longer_queue(candidates: list[Candidate]) -> None:
    ranked = rank(candidates)
    assert sorted(ranked) == sorted(candidate.id for candidate in candidates)
    loads = {candidate.id: candidate.load for candidate in candidates}
    for better, worse in pairwise(ranked):
        assert loads[better] <= loads[worse] + COLD_COST


def test_lost_replicas_are_forgotten() -> None:
    placements = Placements()
    placements.record(("sd", 64, 64), "gone")
    placements.forget_all_but(["new"])
    assert not any(c.warm for c in placements.candidates(("sd", 64, 64), [("gone", 0), ("new", 0)]))


def test_memory_of_groups_is_bounded() -> None:
    placements = Placements(limit=2)
    for size in (8, 16, 24):
        placements.record(("sd", size, size), "r")
    assert not placements.candidates(("sd", 8, 8), [("r", 0)])[0].warm
    assert placements.candidates(("sd", 24, 24), [("r", 0)])[0].warm


@pytest.mark.parametrize("position", [0, 1, 2])
def test_group_is_found_wherever_the_task_stands(position: int) -> None:
    task = GenerationTask(
        model="sd", family="f", width=64, height=128, seed=1, scheduler="DDIMScheduler", steps=1, prompt="x"
    )
    args: list[object] = [AttemptRef(job_id=1, attempt=1), None]
    args.insert(position, task)
    assert group_of(args) == ("sd", 64, 128)
    assert group_of(["stats"]) is None
