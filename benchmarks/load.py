"""Throughput of the whole server: unlike requests one after another, then all at once, in one run.

    python benchmarks/load.py --sizes 64 512 --requests 16 --repetitions 3

Starts its own server on a free port with a fresh data folder, unless --url and --key name a running one. Writes
results/load.json beside this file and prints a table. ``rows`` is the mean number of rows per UNet forward.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from report import RESULTS, machine, write
from server import Server, own_server

from workloads import unlike_requests


@dataclass(frozen=True, slots=True)
class Round:
    """One way of sending the requests, once."""

    seconds: float
    rows: float
    """Mean rows per UNet forward."""


@dataclass(frozen=True, slots=True)
class Result:
    size: int
    requests: int
    steps: int
    sequential: Sequence[Round]
    concurrent: Sequence[Round]

    @property
    def ratio(self) -> float:
        """Throughput all at once over throughput one after another, medians."""
        return _median_seconds(self.sequential) / _median_seconds(self.concurrent)


def _median_seconds(rounds: Sequence[Round]) -> float:
    return statistics.median(one.seconds for one in rounds)


def counters(server: Server) -> tuple[int, int]:
    """UNet forwards and rows so far, over all replicas."""
    denoisers = server.post("system_details", {})["denoisers"]
    return sum(d["unet_forwards"] for d in denoisers), sum(d["unet_rows"] for d in denoisers)


def measure(server: Server, bodies: Sequence[Mapping[str, object]], at_once: int) -> Round:
    """Send all bodies, ``at_once`` at a time."""
    forwards, rows = counters(server)
    begin = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(server.draw, bodies))
    seconds = time.perf_counter() - begin
    forwards_after, rows_after = counters(server)
    return Round(round(seconds, 3), round((rows_after - rows) / (forwards_after - forwards), 2))


def run(server: Server, arguments: argparse.Namespace) -> list[Result]:
    results = []
    for size in arguments.sizes:
        bodies = unlike_requests(arguments.requests, size, arguments.steps)
        measure(server, bodies[:2], 2)  # warm up: models, caches
        sequential, concurrent = [], []
        for _ in range(arguments.repetitions):
            sequential.append(measure(server, bodies, 1))
            concurrent.append(measure(server, bodies, len(bodies)))
        results.append(Result(size, len(bodies), arguments.steps, sequential, concurrent))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: start one")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "load.json")
    arguments = parser.parse_args()
    described = machine()
    if arguments.url:
        results = run(Server(arguments.url, arguments.key), arguments)
    else:
        with own_server() as (url, key):
            results = run(Server(url, key), arguments)
    figures = [asdict(result) | {"ratio": round(result.ratio, 2)} for result in results]
    write(arguments.output, {"repetitions": arguments.repetitions}, figures, described)
    print("size  requests  one after another  all at once  ratio  rows (one, all)")
    for result in results:
        rows = result.sequential[0].rows, result.concurrent[0].rows
        print(
            f"{result.size:4}  {result.requests:8}  {_median_seconds(result.sequential):15.1f} s"
            f"  {_median_seconds(result.concurrent):9.1f} s  {result.ratio:5.2f}  {rows[0]:.1f}, {rows[1]:.1f}"
        )


if __name__ == "__main__":
    main()
