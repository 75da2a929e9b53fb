"""The replay keeps its books right, whatever the policy: otherwise its table would compare nothing."""

from collections import Counter
from collections.abc import Sequence

import pytest
from simulator import LARGE, MIDDLE, SMALL, Arrival, Machine, Policy, Replay, Running, policies, replay

from serve_app.config import DenoiserConfig

CONFIG = DenoiserConfig(max_running=5)
MACHINE = Machine()
CROWD = [
    *[Arrival(0.0, LARGE, 4)] * 7,
    *[Arrival(0.01, SMALL, 9)] * 3,
    Arrival(0.3, MIDDLE, 5),
    Arrival(60.0, SMALL, 2),
]
NAMES = list(policies(CONFIG))


def played(name: str) -> tuple[Replay, list[list[Running]], list[int]]:
    """The outcome, the requests that were there at each turn, and how many of them each forward took."""
    budget, policy = policies(CONFIG)[name]
    there, took = [], []

    def watched(running: Sequence[Running]) -> Sequence[int]:
        chosen = policy(running)
        there.append(list(running))
        took.append(len(chosen))
        assert len({running[index].candidate.group for index in chosen}) == 1
        rows = sum(running[index].candidate.rows for index in chosen)
        group = running[chosen[0]].candidate.group
        assert rows <= budget.rows(group.height, group.width)
        return chosen

    watching: Policy = watched
    return replay(CROWD, budget, watching, MACHINE, CONFIG.max_running), there, took


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_and_nothing_made_up(name: str) -> None:
    result, there, took = played(name)
    served = {side: len(record.latencies_s) for side, record in result.records.items()}
    assert served == Counter(arrival.side for arrival in CROWD)
    assert sum(took) == sum(arrival.steps for arrival in CROWD)
    assert len(took) == result.forwards
    assert all(1 <= len(running) <= CONFIG.max_running for running in there)
    work = sum(2 * arrival.side**2 * arrival.steps for arrival in CROWD) * MACHINE.seconds_per_cell
    assert result.work_s == pytest.approx(work)
    assert sum(record.device_s for record in result.records.values()) == pytest.approx(result.device_s)
    assert result.device_s >= result.work_s + result.forwards * MACHINE.overhead_s - 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_device_idles_only_when_nobody_waits(name: str) -> None:
    """The crowd is served without a pause, and so is the last, who comes to an empty engine."""
    result, _, _ = played(name)
    last = result.end_s - 60.0
    before = result.device_s - last
    assert 0 < before < 60.0
    assert min(result.records[SMALL].latencies_s) == pytest.approx(last)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_is_served_faster_than_alone(name: str) -> None:
    result, _, _ = played(name)
    for side, steps in ((LARGE, 4), (MIDDLE, 5), (SMALL, 2)):
        alone = steps * MACHINE.seconds(2 * side**2)
        assert min(result.records[side].latencies_s) >= alone - 1e-9
    assert result.records[LARGE].worst_wait_s >= MACHINE.seconds(2 * LARGE**2)


def test_every_run_gives_the_same_numbers() -> None:
    assert [played(name)[0] for name in NAMES] == [played(name)[0] for name in NAMES]


def test_the_policies_differ() -> None:
    """A small one in a flood of large: fair policies serve it first, a strict turn last."""
    flood = [*[Arrival(0.0, LARGE, 20)] * 12, Arrival(0.01, SMALL, 20)]
    small = {
        name: replay(flood, budget, policy, MACHINE, 16).records[SMALL].latencies_s[0]
        for name, (budget, policy) in policies(DenoiserConfig()).items()
    }
    order = ["equal per group", "ours: root of the crowd", "equal per picture", "longest waiting (before)"]
    assert sorted(order, key=small.__getitem__) == order
    assert small["ours: root of the crowd"] < small["longest waiting (before)"] / 3
    assert small["one request at a time, in turn"] == max(small.values())
