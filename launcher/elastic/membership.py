"""Who takes part and what follows when that changes: one record that all agents share, and the pure functions that change it.

The record lives in the store as JSON. An agent changes it by compare-and-set only, so every change is a function from the
record it has read to the record it wants; nothing here reads a clock or a socket.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from personmae.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR

Reason = Literal["worker_error", "hang", "peer_lost", "member_joined", "sigterm", "stopped"]
Verdict = Literal["complete", "stopped", "user_error", "failed", "mixed"]
COUNTED: tuple[Reason, ...] = ("worker_error", "hang")
_BROKEN: tuple[Reason, ...] = ("worker_error", "hang", "peer_lost")  # a rank is gone: the others cannot agree on anything
_LONGEST_PAUSE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Policy:
    """What the command line settles, alike for all agents of a run."""

    min_nodes: int
    max_nodes: int
    max_restarts: int = 3
    backoff_seconds: float = 5.0
    batch: int | None = None  # a world size is admissible when it divides this
    inadmissible: Literal["wait", "subset"] = "wait"


@dataclass(frozen=True, slots=True)
class Node:
    """An agent that is ready for the next round. ``port`` is free on its host, for the store of rank 0."""

    id: str
    host: str
    address: str
    port: int
    num_ranks: int


@dataclass(frozen=True, slots=True)
class Report:
    """Why a round has to end, as one agent saw it."""

    reason: Reason
    host: str
    step: int = 0
    time: float = 0.0  # of time.time: it only decides which of several failures is shown as the first
    rank: int | None = None
    code: int | None = None
    tail: str = ""

    def __str__(self) -> str:
        where = f"rank {self.rank} on {self.host}" if self.rank is not None else self.host
        ended = f" ended with code {self.code}" if self.code is not None else ""
        return f"{self.reason}: {where}{ended}, step {self.step}"


@dataclass(frozen=True, slots=True)
class Round:
    """One set of ranks that train together. It runs until somebody reports; then ``active`` empties and the next is formed."""

    number: int = 0
    nodes: tuple[Node, ...] = ()
    shares: tuple[int, ...] = ()  # how many ranks each node runs; 0 is a spare
    active: tuple[str, ...] = ()  # nodes that have neither left nor made ready for the next round
    done: tuple[str, ...] = ()
    reports: tuple[Report, ...] = ()
    broken: bool = False
    pause_seconds: float = 0.0

    @property
    def world_size(self) -> int:
        return sum(self.shares)

    @property
    def first_failure(self) -> Report | None:
        """The earliest of the failures, if it was by one that the round ended."""
        if not self.reports or self.reports[0].reason not in COUNTED:
            return None
        return min((r for r in self.reports if r.reason in COUNTED), key=lambda r: r.time)

    def place(self, node_id: str) -> tuple[int, int] | None:
        """A node's first rank and how many it runs."""
        for i, node in enumerate(self.nodes):
            if node.id == node_id:
                return sum(self.shares[:i]), self.shares[i]
        return None


@dataclass(frozen=True, slots=True)
class Budget:
    """Failures since the last progress. ``step`` is the highest known at the last restart."""

    failures: int = 0
    stops: int = 0
    step: int = -1


@dataclass(frozen=True, slots=True)
class Closed:
    """The run is over, for everybody."""

    code: int
    message: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """The record: what all agents of a run share."""

    round: Round = field(default_factory=Round)
    waiting: tuple[Node, ...] = ()
    budget: Budget = field(default_factory=Budget)
    closed: Closed | None = None
    version: int = 0  # counts the changes, so that an older record is known as such

    def awaits(self, node_id: str) -> bool:
        """Whether a node has made ready for the next round."""
        return any(node.id == node_id for node in self.waiting)

    def knows(self, node_id: str) -> bool:
        return node_id in self.round.active or self.awaits(node_id)


def to_json(record: Record) -> str:
    return json.dumps(asdict(record), separators=(",", ":"))


def from_json(text: str) -> Record:
    raw = json.loads(text)
    nodes = tuple(Node(**node) for node in raw["round"].pop("nodes"))
    reports = tuple(Report(**report) for report in raw["round"].pop("reports"))
    lists = {name: tuple(raw["round"].pop(name)) for name in ("shares", "active", "done")}
    return Record(
        round=Round(nodes=nodes, reports=reports, **lists, **raw["round"]),
        waiting=tuple(Node(**node) for node in raw["waiting"]),
        budget=Budget(**raw["budget"]),
        closed=Closed(**raw["closed"]) if raw["closed"] else None,
        version=raw["version"],
    )


def join(record: Record, node: Node, last: int | None = None) -> Record:
    """A node is ready for the next round. A record that a finished run has left, with nobody in it, is begun again.

    ``last`` is the round that the node has run last: asked from before the present one, it comes too late to count.
    """
    if last is not None and last < record.round.number and node.id in record.round.active:
        return record
    if record.closed:
        return Record(Round(number=record.round.number), (node,)) if not (record.waiting or record.round.active) else record
    others = tuple(n for n in record.waiting if n.id != node.id)
    active = tuple(i for i in record.round.active if i != node.id)
    return replace(record, waiting=(*others, node), round=replace(record.round, active=active))


def leave(record: Record, node_id: str, policy: Policy) -> Record:
    """A node takes no further part. A round that runs with ranks of its cannot go on, unless they are complete."""
    if node_id in _working(record.round) and node_id not in record.round.done and not record.round.reports:
        host = next(node.host for node in record.round.nodes if node.id == node_id)
        record = report(record, record.round.number, Report("peer_lost", host), policy)
    waiting = tuple(n for n in record.waiting if n.id != node_id)
    return replace(record, waiting=waiting, round=replace(record.round, active=_without(record.round.active, [node_id])))


def expire(record: Record, dead: Collection[str], policy: Policy) -> Record:
    """Nodes have not been heard of for too long. Without a spare one, the round goes on."""
    lost = [node for node in record.round.nodes if node.id in dead and node.id in _working(record.round)]
    waiting = tuple(n for n in record.waiting if n.id not in dead)
    record = replace(record, waiting=waiting, round=replace(record.round, active=_without(record.round.active, dead)))
    for node in lost:
        record = report(record, record.round.number, Report("peer_lost", node.host), policy)
    return record


def report(record: Record, number: int, why: Report, policy: Policy) -> Record:
    """Round ``number`` has to end. The first report is charged to the budget; a failure beyond it closes the run."""
    now = record.round
    if record.closed or number != now.number:
        return record
    ended = replace(now, reports=(*now.reports, why), broken=now.broken or why.reason in _BROKEN)
    if now.reports:
        return replace(record, round=ended)
    budget, counted = charge(record.budget, why.reason, max(why.step, record.budget.step))
    pause = pause_seconds(budget.failures, policy.backoff_seconds) if counted else 0.0
    record = replace(record, budget=budget, round=replace(ended, pause_seconds=pause))
    if counted and budget.failures > policy.max_restarts:
        return close(record, EXIT_FAILED, f"{budget.failures} failures without progress, the last is {why}")
    return record


def mark_broken(record: Record, number: int) -> Record:
    """A rank of round ``number``, which was ending in good order, is gone: the others need not be waited for."""
    return replace(record, round=replace(record.round, broken=True)) if number == record.round.number else record


def finish(record: Record, number: int, node_id: str) -> Record:
    """All ranks of a node are complete; when all nodes are, the run is."""
    if record.closed or number != record.round.number:
        return record
    done = (*_without(record.round.done, [node_id]), node_id)
    record = replace(record, round=replace(record.round, done=done))
    needed = {node.id for node, share in zip(record.round.nodes, record.round.shares, strict=True) if share}
    return close(record, EXIT_COMPLETE, "") if needed <= set(done) else record


def close(record: Record, code: int, message: str) -> Record:
    """End the run for everybody. A user error overrides another end, and a message one without."""
    if record.closed and not (code == EXIT_USER_ERROR and (record.closed.code != code or not record.closed.message)):
        return record
    return replace(record, closed=Closed(code, message))


def form(record: Record, policy: Policy, *, settled: bool) -> Record:
    """The next round, once it can be. ``settled``: no newcomer has appeared for the time that first-comers are waited for."""
    if record.closed or record.round.active:
        return record
    nodes = in_order(record)[: policy.max_nodes]
    survivors = {n.id for n in record.round.nodes} & {n.id for n in nodes}
    if len(nodes) < policy.min_nodes or not (survivors or settled or len(nodes) == policy.max_nodes):
        return record
    world_size = world_of(nodes, policy)
    if not world_size:
        return record
    chosen = {n.id for n in nodes}
    return replace(
        record,
        waiting=tuple(n for n in record.waiting if n.id not in chosen),
        round=Round(record.round.number + 1, nodes, shares(nodes, world_size), tuple(n.id for n in nodes)),
    )


def grow(record: Record, policy: Policy) -> bool:
    """Whether those who wait would make the running round's world larger."""
    if record.closed or not record.waiting or record.round.reports:
        return False
    there = (node for node in record.round.nodes if node.id in record.round.active)
    return world_of((*there, *record.waiting)[: policy.max_nodes], policy) > record.round.world_size


def missing(record: Record, node_id: str, policy: Policy) -> str:
    """What the next round of a node that waits has to wait for."""
    if record.closed:
        return "a run that is over has not been left by all its agents"
    if record.round.active and not record.round.reports:
        return f"round {record.round.number} runs without this host"
    if busy := [node.host for node in record.round.nodes if node.id in record.round.active and node.id != node_id]:
        return f"{', '.join(busy)} have not made ready"
    nodes = in_order(record)[: policy.max_nodes]
    if len(nodes) < policy.min_nodes:
        return f"{len(nodes)} of at least {policy.min_nodes} nodes are here"
    if not world_of(nodes, policy):
        total = sum(node.num_ranks for node in nodes)
        return f"{total} ranks cannot share a batch of {policy.batch}; more or fewer nodes are needed"
    return f"{len(nodes)} nodes are here; others have a moment to join them"


def in_order(record: Record) -> tuple[Node, ...]:
    """Who waits, in the order of the previous round, newcomers last: rank 0 stays where it is while its host does."""
    place = {node.id: i for i, node in enumerate(record.round.nodes)}
    return tuple(sorted(record.waiting, key=lambda node: (place.get(node.id, len(place)), node.id)))


def world_of(nodes: Collection[Node], policy: Policy) -> int:
    """The world size that these nodes run; 0 when they have to wait for others."""
    total = sum(node.num_ranks for node in nodes)
    if policy.batch is None or total == 0 or policy.batch % total == 0:
        return total
    return largest_admissible(policy.batch, total) if policy.inadmissible == "subset" else 0


def largest_admissible(batch: int, most: int) -> int:
    """The largest world size up to ``most`` whose ranks take equal parts of a batch."""
    return max(n for n in range(1, most + 1) if batch % n == 0)


def shares(nodes: Collection[Node], world_size: int) -> tuple[int, ...]:
    """How many ranks each node runs, filled in order."""
    found = []
    for node in nodes:
        found.append(min(node.num_ranks, world_size - sum(found)))
    return tuple(found)


def charge(budget: Budget, reason: Reason, step: int) -> tuple[Budget, bool]:
    """The budget after a round has ended at ``step``, and whether that counted as a failure.

    Progress clears it. A stop with the state saved is free, but of those without progress only the first in a row.
    """
    if step > budget.step:
        budget = Budget(step=step)
        stops = 0
    else:
        stops = budget.stops + (reason in ("sigterm", "stopped"))
    counted = reason in COUNTED or (reason in ("sigterm", "stopped") and stops > 1)
    return Budget(budget.failures + counted, stops, budget.step), counted


def pause_seconds(failures: int, base_seconds: float) -> float:
    """How long to wait before the next round: doubled with every failure without progress."""
    return min(base_seconds * 2 ** (failures - 1), _LONGEST_PAUSE_SECONDS) if failures else 0.0


def classify_exit_codes(codes: Collection[int]) -> Verdict:
    """What the exit codes of a host's ranks, those that have ended, mean together."""
    if EXIT_USER_ERROR in codes:
        return "user_error"
    if any(code not in (EXIT_COMPLETE, EXIT_STOPPED) for code in codes):
        return "failed"
    if codes and all(code == EXIT_COMPLETE for code in codes):
        return "complete"
    return "stopped" if codes and all(code == EXIT_STOPPED for code in codes) else "mixed"


def _working(now: Round) -> set[str]:
    """Nodes that have ranks in a round and have not left it."""
    return {node.id for node, share in zip(now.nodes, now.shares, strict=True) if share and node.id in now.active}


def _without(ids: tuple[str, ...], gone: Collection[str]) -> tuple[str, ...]:
    return tuple(i for i in ids if i not in gone)
