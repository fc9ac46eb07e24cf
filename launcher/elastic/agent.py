"""The agent: one host's part in a run, from meeting the others to the exit code.

Agents meet in a round (``membership.py``), each runs its share of the ranks (``ranks.py``), and when a rank fails, hangs or
stops, or a host comes or goes, the round ends everywhere and the next is formed. docs/operations.md has the whole contract.
"""

import contextlib
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from enum import Enum
from pathlib import Path
from typing import Final

from launcher.elastic import membership
from launcher.elastic.http import Metrics, Probes, linger, serve
from launcher.elastic.membership import Closed, Node, Policy, Reason, Record, Report
from launcher.elastic.options import Options
from launcher.elastic.ranks import Limits, RankProcess, Ranks, interface_of, log, rank_environment, reach, reserve_port
from launcher.elastic.reporter import Reporter
from launcher.elastic.store import INTERVAL_SECONDS, Link
from personmae.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR

_TURN_SECONDS, _AGAIN_SECONDS = 0.1, 2.0
_SETTLE_SECONDS = 1.0  # for other ranks of the host to end too, one of them perhaps with the user error behind it all
_KILL_SECONDS, _STUCK_SECONDS = 30.0, 120.0
_ASLEEP_SECONDS = 3.0  # a turn that took longer: this process was stopped, or its machine, and the ranks most likely with it


class State(Enum):
    """What a host is doing. ``Agent`` has a method for each, which is called again and again until the state changes."""

    WAITING = "for a round that has this host"
    RUNNING = "the ranks train"
    SUSPECTING = "a rank has failed: by itself, or because another host is lost?"
    ENDING = "the round is over, and this host's ranks are stopped"
    PAUSING = "between two rounds, longer after each failure"
    COMPLETE = "this host's ranks are complete, and other hosts' may not be"
    LEAVING = "this host has to go, and its ranks may save first"


EXIT: Final = None  # the agent ends
# What may follow each state, and when. Two arrows start everywhere and are left out here: to LEAVING on SIGTERM, on SIGINT or
# when the store has been silent for --store-seconds, and to the agent's end when the record says that the run is closed.
TRANSITIONS: Final[dict[State, dict[State | None, str]]] = {
    State.WAITING: {
        State.RUNNING: "a round with this host has been formed",
        EXIT: "code 1: none came together within --join-seconds",
    },
    State.RUNNING: {
        State.ENDING: "an agent has reported, or this one does: a rank hangs, all have stopped, or the world may grow",
        State.SUSPECTING: "a rank has failed",
        State.COMPLETE: "all ranks have ended with 0",
        EXIT: "code 78: a rank has ended with a user error",
    },
    State.SUSPECTING: {State.ENDING: "all other hosts live and the failure is reported, or another agent has reported"},
    State.ENDING: {
        State.PAUSING: "all ranks have ended",
        EXIT: "code 78: a rank has ended with a user error, or code 1: a rank cannot be killed",
    },
    State.PAUSING: {State.WAITING: "the pause is over"},
    State.COMPLETE: {State.ENDING: "the round has ended elsewhere: its last steps are done again"},
    State.LEAVING: {EXIT: "code 0, 75, 78 or 1: all ranks have ended, or were killed after --grace-seconds"},
}


class Agent:
    """One host's part in a run. Every turn of the loop in ``run`` looks at the record, the ranks and the clock."""

    def __init__(self, options: Options, policy: Policy, limits: Limits) -> None:
        self.options, self.policy, self.limits = options, policy, limits
        self.host = socket.gethostname()
        self.id = f"{self.host}-{uuid.uuid4().hex[:8]}"
        self._beats = Path(tempfile.mkdtemp(prefix="personmae-beats-"))
        self.metrics = Metrics(policy.min_nodes, policy.max_nodes, self._beats)
        self.signals = 0
        self._turned = self._woke = time.monotonic()
        self._ranks = Ranks([], [], self._beats, None)
        self._number = 0  # of the round that _ranks belong to
        self.state = State.WAITING
        self._handlers = {
            State.WAITING: self._wait,
            State.RUNNING: self._watch,
            State.SUSPECTING: self._suspect,
            State.ENDING: self._end,
            State.PAUSING: self._pause,
            State.COMPLETE: self._await_others,
            State.LEAVING: self._depart,
        }
        self._since = self._idle_since = time.monotonic()  # the present state's beginning, and the last round's end
        self._port: socket.socket | None = None
        self._asked, self._logged = 0.0, ""  # when it last asked to join, and what it last logged as missing
        self._failure: Report | None = None
        self._first_exit = self._killed = self._pause_seconds = 0.0
        self._left: Reason | None = None
        self.link = Link(
            options.store,
            options.run_id,
            self.id,
            policy,
            keep_alive_seconds=options.keep_alive_seconds,
            settle_seconds=options.settle_seconds,
        )
        self._reporter = Reporter(self.link, self.id, policy)

    def run(self) -> int:
        """Take part until the run is over or this host has to leave; returns the agent's exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        server = None
        try:
            if self.options.port:
                server = serve(
                    self.options.port, self.metrics, self.probes, host=self.options.host, gpu=self.options.gpu_metrics
                )
            if self.options.log_dir:
                self.options.log_dir.mkdir(parents=True, exist_ok=True)
            self.link.start()
            while True:
                code = self._once()
                if code is not None:
                    if server and code == EXIT_COMPLETE:
                        self.metrics.keep(self._ranks)
                        linger(self.options.linger_seconds, lambda: self.signals > 0)
                    return code
                self.link.changed.wait(_TURN_SECONDS)
                self.link.changed.clear()
        finally:
            self._ranks.kill()
            self.link.close()
            shutil.rmtree(self._beats, ignore_errors=True)
            if server:
                server.shutdown()
                server.server_close()

    def probes(self) -> Probes:
        """Whether this agent should be replaced, and whether it trains; called from the HTTP server's threads."""
        sick = ""
        if (stuck := time.monotonic() - self._turned) > _STUCK_SECONDS:
            sick = f"the agent has been stuck for {stuck:.0f} s"
        elif self.link.silent_seconds() > self.options.store_seconds:
            sick = f"the store has been silent for {self.link.silent_seconds():.0f} s"
        elif self.state is State.RUNNING and (rank := self._hung()):
            sick = "rank {} has been silent for {:.0f} s in phase {}".format(rank.rank, *reversed(rank.silent()))
        return Probes(sick, self.state is State.RUNNING and self._ranks.under_way())

    def _on_signal(self, number: int, _: object) -> None:
        self.signals += 1

    def _go(self, state: State) -> None:
        assert state is State.LEAVING or state in TRANSITIONS[self.state], f"{self.state} -> {state} is not in TRANSITIONS"
        self.state, self._since = state, time.monotonic()

    def _once(self) -> int | None:
        """One turn: what holds in every state, then the present state's own; the exit code once the agent is to end."""
        record, now = self.link.view.record, time.monotonic()
        if now - self._turned > _ASLEEP_SECONDS:
            self._woke = now
            self.link.forgive()
        self._turned = now
        self.link.revive()
        self.metrics.update(record, self._ranks, self.link.silent_seconds(), running=self.state is State.RUNNING)
        if record.closed and record.knows(self.id):
            return self._close(record.closed)
        if not self._left and self.signals:
            self._begin_to_leave("sigterm", "asked to stop")
        elif not self._left and self.link.silent_seconds() > self.options.store_seconds:
            where = "{}:{}".format(*self.options.store)
            self._begin_to_leave("stopped", f"the store at {where} has been silent for {self.options.store_seconds:g} s")
        return self._handlers[self.state](record)

    # A method for each state. It is called each turn, and goes to the next state by ``_go`` or ends the agent by a code.

    def _wait(self, record: Record) -> int | None:
        """WAITING: some agent forms the next round once all are ready."""
        now = record.round
        if now.number != self._number and self.id in now.active:
            self._start(record)
            return None
        others_run = bool(now.active) and not now.reports and self.id not in now.active
        if others_run and self.link.silent_seconds() < self.options.keep_alive_seconds:
            self._since = time.monotonic()  # a spare waits for as long as they do
        waited = time.monotonic() - self._since
        if not record.awaits(self.id) and time.monotonic() - self._asked > _AGAIN_SECONDS:
            self._ask()
        elif waited > self.options.join_seconds:
            missing = self._missing(record)
            return self._leave(EXIT_FAILED, f"no round came together within {self.options.join_seconds:g} s: {missing}")
        elif (others_run or waited > 2) and (missing := self._missing(record)) != self._logged:
            self._logged = missing
            log(f"waiting: {missing}")
        return None

    def _ask(self) -> None:
        self._asked = time.monotonic()
        address = self.options.address
        try:
            address = address or reach(*self.options.store)
            if self._port is None:
                self._port = reserve_port(address)
        except OSError as error:
            log(f"cannot find the way to the store yet: {error}")
            return
        node, last = Node(self.id, self.host, address, self._port.getsockname()[1], self.options.num_ranks), self._number
        self.link.post(lambda record: membership.join(record, node, last))

    def _missing(self, record: Record) -> str:
        if not self.link.connected or self.link.silent_seconds() > 5:
            return "the store at {}:{} does not answer".format(*self.options.store)
        return membership.missing(record, self.id, self.policy)

    def _start(self, record: Record) -> None:
        now = record.round
        address = next(n.address for n in now.nodes if n.id == self.id)
        self._number, self._failure, self._first_exit, self._killed = now.number, None, 0.0, 0.0
        self._reporter.begin(now.number)
        environs = rank_environment(
            now, self.id, run_id=self.options.run_id, beats=self._beats, interface=interface_of(address)
        )
        total = sum(n.num_ranks for n in now.nodes)
        spare = f"; {total - now.world_size} more would not divide {self.policy.batch}" if total > now.world_size else ""
        where = ", ".join(f"{s} on {n.host}" for n, s in zip(now.nodes, now.shares, strict=True))
        seconds = time.monotonic() - self._idle_since
        log(f"round {now.number}: {now.world_size} ranks ({where}){spare}; {len(environs)} here, after {seconds:.1f} s")
        self.metrics.begin(seconds, self._ranks, record.budget.step)
        self._ranks = Ranks(self.options.command, environs, self._beats, self.options.log_dir)
        self._go(State.RUNNING)

    def _watch(self, record: Record) -> int | None:
        """RUNNING: the ranks are at work."""
        codes = self._ranks.codes()
        if self._over(record):
            self._go(State.ENDING)
        elif rank := self._hung():
            phase, seconds = rank.silent()
            text = f"rank {rank.rank} was silent for {seconds:.1f} s in phase {phase}"
            text += "" if rank.beat() else "; a script that sends no heartbeats needs --start-seconds inf"
            log(f"hang: {text}")
            self._report("hang", rank=rank.rank, tail=text)
            self._go(State.ENDING)
        elif codes:
            self._first_exit = self._first_exit or time.monotonic()
            return self._follow_exits(time.monotonic() - self._first_exit)
        elif self._may_grow(record):
            self._report("member_joined")
            self._go(State.ENDING)
        return None

    def _hung(self) -> RankProcess | None:
        return self._ranks.hung(self.limits, time.monotonic() - self._woke)

    def _may_grow(self, record: Record) -> bool:
        first = record.round.active[0] == self.id
        return first and membership.grow(record, self.policy) and self.link.settled() and self._ranks.under_way()

    def _follow_exits(self, seconds: float) -> int | None:
        """Some ranks have ended by themselves, the first of them so long ago."""
        ended, verdict = self._ranks.ended(), self._verdict()
        if verdict == "user_error":
            return self._user_error() if ended or seconds > 2 * _SETTLE_SECONDS else None
        if verdict == "failed":
            if ended or seconds > _SETTLE_SECONDS:
                rank = self._ranks.first_failed()
                self._failure = Report(
                    "worker_error", self.host, self._ranks.step(), rank.ended_at, rank.rank, rank.code(), rank.tail()
                )
                log(f"rank {rank.rank} ended with code {rank.code()}")
                self._kill()
                self._go(State.SUSPECTING)
        elif ended and verdict == "complete":
            self._reporter.finish()
            self._go(State.COMPLETE)
        elif ended or (verdict != "complete" and seconds > self.options.grace_seconds):
            self._report("stopped")
            self._go(State.ENDING)
        return None

    def _verdict(self) -> membership.Verdict:
        return membership.classify_exit_codes(self._ranks.codes().values())

    def _suspect(self, record: Record) -> int | None:
        """SUSPECTING: when the other hosts were last heard shows whether one of them is lost."""
        assert self._failure
        heard, failed_at = self.link.view.heard, self._since
        others = [node_id for node_id in record.round.active if node_id != self.id]
        alive = all(heard.get(node_id, 0) > failed_at + 2 * INTERVAL_SECONDS for node_id in others)
        if alive or self._over(record):
            self._reporter.report(self._failure)
            self._go(State.ENDING)
        return None

    def _end(self, record: Record) -> int | None:
        """ENDING: this host's ranks are stopped, in good order where that is still possible."""
        gone = record.round.number != self._number
        if not (gone or self._over(record)):
            return self._reporter.repeat()  # it is on its way
        if not self._ranks.ended():
            return self._stop_ranks(record, gone=gone)
        verdict = self._verdict()
        if verdict == "user_error":
            return self._user_error()
        if verdict == "complete" and self._ranks.all:
            self._reporter.finish()
        self._log_end(record)
        self._pause_seconds = 0.0 if gone else record.round.pause_seconds
        self._idle_since = time.monotonic()
        self._go(State.PAUSING)
        return None

    def _stop_ranks(self, record: Record, *, gone: bool) -> int | None:
        """Ask the ranks to save and end, or kill them where one is lost; ``gone``: the others train in another round."""
        failed, seconds = self._verdict() == "failed", time.monotonic() - self._since
        if any(r.reason == "hang" for r in record.round.reports) and not self._killed and not gone:
            for lines in self._ranks.traces():
                log(lines)
            self._kill()
        if failed:
            self._reporter.mark_broken()
        if gone or failed or record.round.broken or self.id not in record.round.active:
            self._kill()
        elif seconds > self.options.grace_seconds:
            log(f"ranks did not stop within {self.options.grace_seconds:g} s")
            self._reporter.mark_broken()
            self._kill()
        else:
            self._ranks.stop()
        if self._killed and time.monotonic() - self._killed > _KILL_SECONDS:
            return self._leave(EXIT_FAILED, "a rank cannot be killed; this host has to be restarted")
        return None

    def _pause(self, _: Record) -> int | None:
        """PAUSING: after a failure, longer each time."""
        if time.monotonic() - self._since >= self._pause_seconds:
            if self._port:
                self._port.close()  # it was held throughout the round, for rank 0
                self._port = None
            self._ask()
            self._logged = ""
            self._go(State.WAITING)
        return None

    def _await_others(self, record: Record) -> int | None:
        """COMPLETE: the run is over when the ranks of all hosts are complete."""
        if self._over(record):
            return self._go(State.ENDING)
        return None if self.id in record.round.done else self._reporter.repeat()

    def _depart(self, record: Record) -> int | None:
        """LEAVING: the ranks were asked to save."""
        ended, verdict = self._ranks.ended(), self._verdict()
        in_time = time.monotonic() - self._since < self.options.grace_seconds
        broken = verdict in ("failed", "user_error") or (record.round.number == self._number and record.round.broken)
        if not ended and in_time and not broken:
            return None
        if not ended:
            self._reporter.mark_broken()
            self._kill()
        if verdict == "user_error":
            return self._user_error()
        if verdict == "complete" and ended:
            self._reporter.finish()
            return self._leave(EXIT_COMPLETE, "complete")
        if verdict == "failed":
            self._reporter.mark_broken()
        if self._left == "sigterm" or verdict == "stopped":
            kept = "all ranks have stopped, their state saved" if verdict == "stopped" else "no rank had anything to save"
            return self._leave(EXIT_STOPPED, kept if not self._killed else "ranks were killed; the last checkpoint stands")
        codes = ", ".join(f"{rank}: {code}" for rank, code in self._ranks.codes().items())
        return self._leave(EXIT_FAILED, "the store is gone" + (f", and ranks ended with codes {codes}" if codes else ""))

    # What the states have in common.

    def _over(self, record: Record) -> bool:
        """Whether the round that this host's ranks belong to has ended, or goes on without it."""
        return record.round.number != self._number or bool(record.round.reports) or self.id not in record.round.active

    def _report(self, reason: Reason, *, rank: int | None = None, tail: str = "") -> None:
        self._reporter.report(Report(reason, self.host, self._ranks.step(), time.time(), rank, None, tail))

    def _kill(self) -> None:
        if not self._killed:
            self._killed = time.monotonic()
            self._ranks.kill()

    def _log_end(self, record: Record) -> None:
        for code in self._ranks.codes().values():
            self.metrics.exits.labels(code).inc()
        if record.round.number != self._number or not record.round.reports:
            log(f"round {self._number} goes on without this host; joining again")
            self.metrics.restarts.labels("peer_lost").inc()
            return
        why = record.round.reports[0]
        self.metrics.restarts.labels(why.reason).inc()
        failures, pause_seconds = record.budget.failures, record.round.pause_seconds
        counted = f"; failure {failures} of at most {self.policy.max_restarts}" if failures else ""
        pause = f"; going on in {pause_seconds:g} s" if pause_seconds else ""
        log(f"round {self._number} ended: {why}{counted}{pause}")
        _log_failure(record)

    def _begin_to_leave(self, reason: Reason, why: str) -> None:
        self._left = reason
        at_work = not self._ranks.ended()
        self._ranks.stop()
        log(f"{why}; " + (f"giving ranks {self.options.grace_seconds:g} s to save" if at_work else "no ranks run here"))
        if reason == "sigterm" and at_work:
            self._report("sigterm")
        self._go(State.LEAVING)

    def _user_error(self) -> int:
        line = self._ranks.user_error()
        self._kill()
        self.link.post(lambda record: membership.close(record, EXIT_USER_ERROR, line))
        return self._close(Closed(EXIT_USER_ERROR, line))

    def _close(self, closed: Closed) -> int:
        """The run is over for everybody."""
        self._kill()
        if closed.code == EXIT_USER_ERROR:
            deadline = time.monotonic() + 2
            while not closed.message and time.monotonic() < deadline:  # rank 0, on another host, is the one that says it
                time.sleep(_TURN_SECONDS)
                closed = self.link.view.record.closed or closed
            with contextlib.suppress(OSError):
                print(closed.message or "error: a rank ended with a user error", file=sys.stderr, flush=True)
            return self._leave(EXIT_USER_ERROR, "a user error; not to be repeated")
        if closed.code == EXIT_COMPLETE:
            return self._leave(EXIT_COMPLETE, "complete")
        _log_failure(self.link.view.record)
        return self._leave(closed.code, closed.message)

    def _leave(self, code: int, why: str) -> int:
        self.link.post(lambda record: membership.leave(record, self.id, self.policy))
        self.link.flush(3 if self.link.silent_seconds() < 3 else 0)
        log(f"ends with code {code}: {why}")
        return code


def _log_failure(record: Record) -> None:
    """The last lines of the rank that failed first."""
    if first := record.round.first_failure:
        log(f"the first failure: {first}; its last lines:\n{first.tail}")
