"""What sharing a device fairly costs and brings: a replay of workloads against the engine's own planner.

    python benchmarks/simulator.py --json benchmarks/results/simulator.json --plot benchmarks/results/simulator.png

No clock and no model: a forward takes ``overhead + rows x latent cells x seconds per cell``, arrivals come from a seed,
and every run of this script gives the same numbers. The figures of the cost model are those of SD 1.5 with a ControlNet
on an H200 in eager mode (``FORWARD_OVERHEAD`` in ``engine/batching.py`` says where they come from); both can be set.
Encoding and decoding take no time here: the question is who waits for whose steps.
"""

import argparse
import json
import random
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Protocol

from serve_app.config import DenoiserConfig
from serve_app.engine.batching import FORWARD_OVERHEAD, Budget, Candidate, Group, Planner

SEED = 7
LARGE, MIDDLE, SMALL = 128, 64, 32
"""Sides of latents: pictures of 1024, 512 and 256 pixels."""


@dataclass(frozen=True, slots=True)
class Machine:
    """How long a forward takes."""

    seconds_per_cell: float = 1.09e12 / 790e12 / 64**2
    """1.09 TFLOP for a row of 64 x 64 cells, UNet and ControlNet, at 790 TFLOP/s."""
    overhead_s: float = FORWARD_OVERHEAD * 1.09e12 / 790e12 / 64**2

    def seconds(self, cells: int) -> float:
        return self.overhead_s + cells * self.seconds_per_cell


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request for one picture with guidance."""

    at_s: float
    side: int
    """Of its latent, cells."""
    steps: int = 30


@dataclass(slots=True, eq=False)
class Running:
    """A request that holds a place in the batch."""

    arrival: Arrival
    candidate: Candidate
    done: int = 0
    waits_since: tuple[int, float] = (0, 0.0)
    """Turn and time at which it began to wait for its next evaluation."""


@dataclass(slots=True)
class Record:
    """What came of the requests of one size."""

    latencies_s: list[float] = field(default_factory=list)
    """From arrival to the last evaluation."""
    worst_wait_turns: int = 0
    worst_wait_s: float = 0.0
    """Longest time between two evaluations of a request, its own forward included."""
    device_s: float = 0.0


@dataclass(slots=True)
class Replay:
    """A workload that ran to its end."""

    records: dict[int, Record]
    """By side of the latent."""
    forwards: int = 0
    device_s: float = 0.0
    work_s: float = 0.0
    """The part of ``device_s`` that computed rows somebody asked for: neither overhead nor padding."""
    end_s: float = 0.0


class Policy(Protocol):
    """Who shares the next forward: indices of ``running``."""

    def __call__(self, running: Sequence[Running]) -> Sequence[int]: ...


class Fair:
    """The engine's planner."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def __call__(self, running: Sequence[Running]) -> Sequence[int]:
        return self._planner.plan([each.candidate for each in running])


class EqualGroups(Planner):
    """The rival that gives every group the same, however many wait in it."""

    def weight(self, pictures: int) -> float:
        del pictures
        return 1.0


class EqualPictures(Planner):
    """The rival that gives every picture the same."""

    def weight(self, pictures: int) -> float:
        return float(pictures)


class LongestWaiting:
    """The picture that waits longest picks who may share its forward; the others of its kind follow by waiting.

    With groups alone as kinds this was the engine's policy before: every picture advances once a round, be its group
    large or small.
    """

    def __init__(self, budget: Budget, kind: Callable[[Running], object]) -> None:
        self._budget = budget
        self._kind = kind

    def __call__(self, running: Sequence[Running]) -> Sequence[int]:
        queue = sorted(range(len(running)), key=lambda index: (running[index].candidate.served, index))
        head = running[queue[0]]
        room = self._budget.rows(head.candidate.group.height, head.candidate.group.width)
        chosen = []
        for index in queue:
            rows = running[index].candidate.rows
            if self._kind(running[index]) == self._kind(head) and rows <= room:
                chosen.append(index)
                room -= rows
        return chosen


def policies(config: DenoiserConfig) -> Mapping[str, tuple[Budget, Policy]]:
    """Each with a state of its own."""
    free = Budget(config.max_rows, config.max_latent_area)
    pinned = Budget(config.max_rows, config.max_latent_area, deterministic=True)
    return {
        "ours: root of the crowd": (free, Fair(Planner(free))),
        "equal per group": (free, Fair(EqualGroups(free))),
        "equal per picture": (free, Fair(EqualPictures(free))),
        "longest waiting (before)": (free, LongestWaiting(free, lambda one: one.candidate.group)),
        "only equal steps of equal requests": (
            free,
            LongestWaiting(free, lambda one: (one.candidate.group, one.arrival.steps, one.done)),
        ),
        "one request at a time, in turn": (free, LongestWaiting(free, id)),
        "ours, deterministic": (pinned, Fair(Planner(pinned))),
    }


def poisson(source: random.Random, per_s: float, until_s: float, side: int) -> list[Arrival]:
    """Requests that come at random, of 20 to 40 steps."""
    arrivals, at_s = [], source.expovariate(per_s)
    while at_s < until_s:
        arrivals.append(Arrival(at_s, side, source.randint(20, 40)))
        at_s += source.expovariate(per_s)
    return arrivals


def waves(side: int, every_s: float) -> list[Arrival]:
    """Twelve requests at once, for 40 s. No more, because who waits for a place in the batch is not the planner's
    matter: in the database the tenants take turns."""
    return [Arrival(wave * every_s, side) for wave in range(int(40 / every_s)) for _ in range(12)]


def workloads() -> Mapping[str, list[Arrival]]:
    """Most are near what the machine can do: where it idles, any policy will do."""
    source = random.Random(SEED)
    return {
        "mixed sizes": [
            *poisson(source, 0.6, 60, LARGE),
            *poisson(source, 2.5, 60, MIDDLE),
            *poisson(source, 3, 60, SMALL),
        ],
        "flood of large, few small": waves(LARGE, every_s=4) + poisson(source, 0.8, 40, SMALL),
        "flood of middle, few large": waves(MIDDLE, every_s=1.5) + poisson(source, 0.3, 40, LARGE),
        "13 large, one small": [*[Arrival(0, LARGE)] * 13, Arrival(0.05, SMALL)],
        "one at a time": [Arrival(2.0 * n, side) for n, side in enumerate([SMALL, MIDDLE, LARGE] * 5)],
    }


def replay(arrivals: Sequence[Arrival], budget: Budget, policy: Policy, machine: Machine, max_running: int) -> Replay:
    """Serve ``arrivals`` to the end as the engine does: who came first joins first, a step at a time."""
    coming = deque(sorted(arrivals, key=lambda arrival: arrival.at_s))
    running: list[Running] = []
    result = Replay({arrival.side: Record() for arrival in arrivals})
    now_s, turn = 0.0, 0
    while coming or running:
        if not running:
            now_s = max(now_s, coming[0].at_s)
        while coming and coming[0].at_s <= now_s and len(running) < max_running:
            arrival = coming.popleft()
            group = Group("model", arrival.side, arrival.side, 77)
            running.append(Running(arrival, Candidate(group, 2, turn), waits_since=(turn, now_s)))
        turn += 1
        chosen = [running[index] for index in policy(running)]
        group = chosen[0].candidate.group
        rows = sum(each.candidate.rows for each in chosen)
        seconds = machine.seconds(budget.cost(group, rows) - FORWARD_OVERHEAD)
        now_s += seconds
        result.forwards += 1
        result.device_s += seconds
        result.work_s += rows * group.height * group.width * machine.seconds_per_cell
        record = result.records[group.height]
        record.device_s += seconds
        for each in chosen:
            since_turn, since_s = each.waits_since
            record.worst_wait_turns = max(record.worst_wait_turns, turn - since_turn)
            record.worst_wait_s = max(record.worst_wait_s, now_s - since_s)
            each.candidate = Candidate(group, each.candidate.rows, turn)
            each.done, each.waits_since = each.done + 1, (turn, now_s)
            if each.done == each.arrival.steps:
                record.latencies_s.append(now_s - each.arrival.at_s)
                running.remove(each)
    result.end_s = now_s
    return result


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: one size under one policy."""

    workload: str
    policy: str
    side: int
    requests: int
    mean_latency_s: float
    worst_latency_s: float
    worst_wait_turns: int
    worst_wait_s: float
    device_share: float
    """Of all device time of the workload."""
    pictures_per_device_s: float
    """Of all sizes: what a machine that never idles makes of this mixture."""
    work_share: float
    """Of all sizes: the part of the device time that was neither overhead nor padding."""


def measure(config: DenoiserConfig, machine: Machine) -> list[Row]:
    """Every workload under every policy."""
    rows = []
    for workload, arrivals in workloads().items():
        for name, (budget, policy) in policies(config).items():
            result = replay(arrivals, budget, policy, machine, config.max_running)
            for side, record in sorted(result.records.items(), reverse=True):
                rows.append(
                    Row(
                        workload,
                        name,
                        side,
                        len(record.latencies_s),
                        round(mean(record.latencies_s), 4),
                        round(max(record.latencies_s), 4),
                        record.worst_wait_turns,
                        round(record.worst_wait_s, 4),
                        round(record.device_s / result.device_s, 4),
                        round(len(arrivals) / result.device_s, 4),
                        round(result.work_s / result.device_s, 4),
                    )
                )
    return rows


def show(rows: Sequence[Row]) -> None:
    shown = None
    for row in rows:
        if row.workload != shown:
            shown = row.workload
            print(f"\n{shown}\n{'policy':<36}{'side':>5}{'n':>5}{'mean s':>8}{'worst s':>9}", end="")
            print(f"{'wait turns':>12}{'wait s':>8}{'device':>8}{'pictures/s':>12}{'work':>6}")
        print(
            f"{row.policy:<36}{row.side:>5}{row.requests:>5}{row.mean_latency_s:>8.2f}{row.worst_latency_s:>9.2f}"
            f"{row.worst_wait_turns:>12}{row.worst_wait_s:>8.3f}{row.device_share:>8.0%}"
            f"{row.pictures_per_device_s:>12.2f}{row.work_share:>6.0%}"
        )


FIGURES: Mapping[str, Callable[[Row], float]] = {
    "mean latency, s": lambda row: row.mean_latency_s,
    "worst wait between two steps, s": lambda row: row.worst_wait_s,
    "share of device time": lambda row: row.device_share,
}
"""What is plotted, a row of panels each."""


def plot(rows: Sequence[Row], path: Path) -> None:
    """``FIGURES`` of each size under each policy, a column of panels a workload."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row.workload for row in rows))
    rivals = list(dict.fromkeys(row.policy for row in rows))
    figure, panels = plt.subplots(
        len(FIGURES), len(names), figsize=(3.2 * len(names), 9), sharex="row", sharey=True, layout="constrained"
    )
    for (label, read), line in zip(FIGURES.items(), panels, strict=True):
        for panel, name in zip(line, names, strict=True):
            for side, marker in ((LARGE, "s"), (MIDDLE, "D"), (SMALL, "o")):
                found = [row for row in rows if (row.workload, row.side) == (name, side)]
                places = [rivals.index(row.policy) for row in found]
                panel.plot([read(row) for row in found], places, marker, label=f"latent {side} x {side}")
            panel.set(title=name, xlabel=label, xscale="log" if label.endswith(", s") else "linear")
            panel.set_yticks(range(len(rivals)), rivals)
            panel.grid(alpha=0.3)
    panels[0, 0].invert_yaxis()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overhead-ms", type=float, default=Machine().overhead_s * 1e3)
    parser.add_argument("--cell-us", type=float, default=Machine().seconds_per_cell * 1e6, help="one cell of one row")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--plot", type=Path, help="draw them there, as PNG")
    options = parser.parse_args(arguments)
    config = DenoiserConfig()
    machine = Machine(options.cell_us / 1e6, options.overhead_ms / 1e3)
    rows = measure(config, machine)
    show(rows)
    if options.json is not None:
        report = {
            "seed": SEED,
            "machine": asdict(machine),
            "max_rows": config.max_rows,
            "max_latent_area": config.max_latent_area,
            "max_running": config.max_running,
            "results": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
