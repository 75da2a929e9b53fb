"""Which denoiser replica takes a request: the policy, and the Serve request router that applies it.

Requests share a UNet step when they have the same base model and latent size, so a replica that already serves such a
group (a *warm* one) is preferred until its queue is clearly longer than another's; then the group spreads. The policy
is a pure function; the router only gathers what it needs. State is per handle: each dispatcher learns for itself.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.tasks import GenerationTask

Group = tuple[str, int, int]
"""Base model, width, height: what rows of one UNet forward must share."""

COLD_COST = 4
"""How many requests longer a warm replica's queue may be before a cold replica takes the next one."""

REMEMBERED_GROUPS = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the policy knows of one replica."""

    id: str
    load: int
    """Requests it holds, running and waiting."""
    warm: bool
    """Whether this group was sent there before."""
    groups: int
    """How many other groups were sent there."""


def rank(candidates: Iterable[Candidate]) -> list[str]:
    """Replica ids, best first: short queues, with a bonus for warm ones; ties go to the one with fewest groups."""
    ordered = sorted(candidates, key=lambda c: (c.load + (0 if c.warm else COLD_COST), not c.warm, c.groups, c.id))
    return [candidate.id for candidate in ordered]


@dataclass(slots=True)
class Placements:
    """Where each group was sent, for as many groups as are remembered."""

    limit: int = REMEMBERED_GROUPS
    _replicas: OrderedDict[Group, set[str]] = field(default_factory=OrderedDict)

    def record(self, group: Group, replica: str) -> None:
        self._replicas.setdefault(group, set()).add(replica)
        self._replicas.move_to_end(group)
        while len(self._replicas) > self.limit:
            self._replicas.popitem(last=False)

    def candidates(self, group: Group, loads: Iterable[tuple[str, int]]) -> list[Candidate]:
        warm = self._replicas.get(group, set())
        return [
            Candidate(
                id=replica,
                load=load,
                warm=replica in warm,
                groups=sum(replica in homes for other, homes in self._replicas.items() if other != group),
            )
            for replica, load in loads
        ]

    def forget_all_but(self, replicas: Iterable[str]) -> None:
        alive = set(replicas)
        for homes in self._replicas.values():
            homes.intersection_update(alive)


def group_of(args: Sequence[object]) -> Group | None:
    """The group of a ``generate`` call's positional arguments; None for any other call."""
    task = next((arg for arg in args if isinstance(arg, GenerationTask)), None)
    return (task.model, task.width, task.height) if task is not None else None


class GroupRouter(RequestRouter):
    """Sends each request to the best replica by ``rank``; without a task to look at, to the shortest queue."""

    def initialize_state(self, **_: object) -> None:
        self._placements = Placements()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        # Always true: without it Serve's routing loop asks again at once, and spins while every replica is full.
        pending_request.routing_context.should_backoff = True
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        group = group_of(pending_request.args)
        if group is None:
            return [candidate_replicas]
        self._placements.forget_all_but(by_id)
        ranked = rank(self._placements.candidates(group, ((id_, self._load(r)) for id_, r in by_id.items())))
        # One replica a rank: within a rank Serve would pick by queue length alone.
        return [[by_id[id_]] for id_ in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        del result
        group = group_of(pending_request.args)
        if group is not None:
            self._placements.record(group, replica_id.unique_id)

    def _load(self, replica: RunningReplica) -> int:
        # Serve keeps this count current while it sends; unknown (a new replica) means empty.
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
