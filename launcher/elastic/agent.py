"""The agent: the life of one host's part in a run, from meeting the others to the exit code.

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
from collections.abc import Callable
from pathlib import Path

from launcher.elastic import membership
from launcher.elastic.http import Health, Metrics, linger, serve
from launcher.elastic.membership import Closed, Node, Policy, Reason, Report, State
from launcher.elastic.options import Options
from launcher.elastic.ranks import Limits, RankProcess, Ranks, interface_of, rank_environment, reach, reserve_port, say
from launcher.elastic.store import INTERVAL_SECONDS, Change, Link
from personmae.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER_ERROR

_TURN_SECONDS, _AGAIN_SECONDS = 0.1, 2.0
_SETTLE_SECONDS = 1.0  # for other ranks of the host to end too, one of them perhaps with the user error behind it all
_KILL_SECONDS, _STUCK_SECONDS = 30.0, 120.0
_ASLEEP_SECONDS = 3.0  # a turn that took longer: this process was stopped, or its machine, and the ranks most likely with it


class Agent:
    """One host's part in a run. ``run`` is its life; every turn of its loop looks at the record, the ranks and the clock."""

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
        self._turn: Callable[[State], int | None] = self._wait
        self._since = self._idle_since = time.monotonic()  # the present turn's beginning, and the last round's end
        self._port: socket.socket | None = None
        self._asked, self._told = 0.0, ""
        self._failure: Report | None = None
        self._said: Change | None = None  # what ends this host's part in the round
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

    def run(self) -> int:
        """Take part until the run is over or this host has to leave; returns the agent's exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        server = None
        try:
            if self.options.port:
                server = serve(
                    self.options.port, self.metrics, self.health, host=self.options.host, gpu=self.options.gpu_metrics
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

    def health(self) -> Health:
        """Whether this agent should be replaced; called from the HTTP server's threads."""
        sick = ""
        if (stuck := time.monotonic() - self._turned) > _STUCK_SECONDS:
            sick = f"the agent has been stuck for {stuck:.0f} s"
        elif self.link.silent_seconds() > self.options.store_seconds:
            sick = f"the store has been silent for {self.link.silent_seconds():.0f} s"
        elif self._turn == self._watch and (rank := self._hung()):
            sick = "rank {} has been silent for {:.0f} s in phase {}".format(rank.rank, *reversed(rank.silent()))
        return Health(sick, self._turn == self._watch and self._ranks.under_way())

    def _on_signal(self, number: int, _: object) -> None:
        self.signals += 1

    def _go(self, turn: Callable[[State], int | None]) -> None:
        self._turn, self._since = turn, time.monotonic()

    def _once(self) -> int | None:
        state, now = self.link.view.state, time.monotonic()
        if now - self._turned > _ASLEEP_SECONDS:
            self._woke = now
            self.link.forgive()
        self._turned = now
        self.link.revive()
        self.metrics.show(state, self._ranks, self.link.silent_seconds(), running=self._turn == self._watch)
        if state.closed and state.knows(self.id):
            return self._close(state.closed)
        if not self._left and self.signals:
            self._begin_to_leave("sigterm", "asked to stop")
        elif not self._left and self.link.silent_seconds() > self.options.store_seconds:
            where = "{}:{}".format(*self.options.store)
            self._begin_to_leave("stopped", f"the store at {where} has been silent for {self.options.store_seconds:g} s")
        return self._turn(state)

    # One method for each thing an agent can be doing: it is called again and again until it calls _go.

    def _wait(self, state: State) -> int | None:
        """For the next round, which some agent forms once all are ready."""
        now = state.round
        if now.number != self._number and self.id in now.active:
            self._start(state)
            return None
        others_run = bool(now.active) and not now.reports and self.id not in now.active
        if others_run and self.link.silent_seconds() < self.options.keep_alive_seconds:
            self._since = time.monotonic()  # a spare waits for as long as they do
        waited = time.monotonic() - self._since
        if not state.awaits(self.id) and time.monotonic() - self._asked > _AGAIN_SECONDS:
            self._ask()
        elif waited > self.options.join_seconds:
            missing = self._missing(state)
            return self._leave(EXIT_FAILED, f"no round came together within {self.options.join_seconds:g} s: {missing}")
        elif (others_run or waited > 2) and (missing := self._missing(state)) != self._told:
            self._told = missing
            say(f"waiting: {missing}")
        return None

    def _ask(self) -> None:
        self._asked = time.monotonic()
        address = self.options.address
        try:
            address = address or reach(*self.options.store)
            if self._port is None:
                self._port = reserve_port(address)
        except OSError as error:
            say(f"cannot find the way to the store yet: {error}")
            return
        node, last = Node(self.id, self.host, address, self._port.getsockname()[1], self.options.num_ranks), self._number
        self.link.post(lambda state: membership.join(state, node, last))

    def _missing(self, state: State) -> str:
        if not self.link.connected or self.link.silent_seconds() > 5:
            return "the store at {}:{} does not answer".format(*self.options.store)
        return membership.missing(state, self.id, self.policy)

    def _start(self, state: State) -> None:
        now = state.round
        address = next(n.address for n in now.nodes if n.id == self.id)
        self._number, self._failure, self._said, self._first_exit, self._killed = now.number, None, None, 0.0, 0.0
        environs = rank_environment(
            now, self.id, run_id=self.options.run_id, beats=self._beats, interface=interface_of(address)
        )
        total = sum(n.num_ranks for n in now.nodes)
        spare = f"; {total - now.world_size} more would not divide {self.policy.batch}" if total > now.world_size else ""
        where = ", ".join(f"{s} on {n.host}" for n, s in zip(now.nodes, now.shares, strict=True))
        seconds = time.monotonic() - self._idle_since
        say(f"round {now.number}: {now.world_size} ranks ({where}){spare}; {len(environs)} here, after {seconds:.1f} s")
        self.metrics.begin(seconds, self._ranks, state.budget.step)
        self._ranks = Ranks(self.options.command, environs, self._beats, self.options.log_dir)
        self._go(self._watch)

    def _watch(self, state: State) -> int | None:
        """The ranks at work."""
        codes = self._ranks.codes()
        if self._over(state):
            self._go(self._end)
        elif rank := self._hung():
            phase, seconds = rank.silent()
            text = f"rank {rank.rank} said nothing for {seconds:.1f} s in phase {phase}"
            text += "" if rank.beat() else "; a script that sends no heartbeats needs --start-seconds inf"
            say(f"hang: {text}")
            self._report("hang", rank=rank.rank, tail=text)
            self._go(self._end)
        elif codes:
            self._first_exit = self._first_exit or time.monotonic()
            return self._judge(time.monotonic() - self._first_exit)
        elif self._may_grow(state):
            self._report("member_joined")
            self._go(self._end)
        return None

    def _hung(self) -> RankProcess | None:
        return self._ranks.hung(self.limits, time.monotonic() - self._woke)

    def _may_grow(self, state: State) -> bool:
        first = state.round.active[0] == self.id
        return first and membership.grow(state, self.policy) and self.link.settled() and self._ranks.under_way()

    def _judge(self, seconds: float) -> int | None:
        """Some ranks have ended by themselves, the first of them so long ago."""
        ended, verdict = self._ranks.ended(), membership.judge(self._ranks.codes().values())
        if verdict == "user_error":
            return self._user_error() if ended or seconds > 2 * _SETTLE_SECONDS else None
        if verdict == "failed":
            if ended or seconds > _SETTLE_SECONDS:
                rank = self._ranks.first_failed()
                self._failure = Report(
                    "worker_error", self.host, self._ranks.step(), rank.ended_at, rank.rank, rank.code(), rank.tail()
                )
                say(f"rank {rank.rank} ended with code {rank.code()}")
                self._kill()
                self._go(self._suspect)
        elif ended and verdict == "complete":
            self._finish()
            self._go(self._done)
        elif ended or (verdict != "complete" and seconds > self.options.grace_seconds):
            self._report("stopped")
            self._go(self._end)
        return None

    def _suspect(self, state: State) -> int | None:
        """A rank has failed: by itself, or because another host is lost? That shows when the others were last heard."""
        assert self._failure
        heard, failed_at, number, why = self.link.view.heard, self._since, self._number, self._failure
        others = [node_id for node_id in state.round.active if node_id != self.id]
        alive = all(heard.get(node_id, 0) > failed_at + 2 * INTERVAL_SECONDS for node_id in others)
        if alive or self._over(state):
            self._end_by(lambda state: membership.report(state, number, why, self.policy))
            self._go(self._end)
        return None

    def _end(self, state: State) -> int | None:
        """The round is over: stop this host's ranks, in good order where that is still possible."""
        seconds, gone = time.monotonic() - self._since, state.round.number != self._number
        if not (gone or self._over(state)):
            return self._repeat()  # what this agent has reported is on its way
        if not self._ranks.ended():
            failed = membership.judge(self._ranks.codes().values()) == "failed"
            if any(r.reason == "hang" for r in state.round.reports) and not self._killed and not gone:
                for told in self._ranks.traces():
                    say(told)
                self._kill()
            if failed:
                self._tear()
            if gone or failed or state.round.broken or self.id not in state.round.active:
                self._kill()
            elif seconds > self.options.grace_seconds:
                say(f"ranks did not stop within {self.options.grace_seconds:g} s")
                self._tear()
                self._kill()
            else:
                self._ranks.stop()
            if self._killed and time.monotonic() - self._killed > _KILL_SECONDS:
                return self._leave(EXIT_FAILED, "a rank cannot be killed; this host has to be restarted")
            return None
        verdict = membership.judge(self._ranks.codes().values())
        if verdict == "user_error":
            return self._user_error()
        if verdict == "complete" and self._ranks.all:
            self._finish()
        self._tell_end(state)
        self._pause_seconds = 0.0 if gone else state.round.pause_seconds
        self._idle_since = time.monotonic()
        self._go(self._pause)
        return None

    def _pause(self, _: State) -> int | None:
        """After a failure, longer each time."""
        if time.monotonic() - self._since >= self._pause_seconds:
            if self._port:
                self._port.close()  # it was held throughout the round, for rank 0
                self._port = None
            self._ask()
            self._told = ""
            self._go(self._wait)
        return None

    def _done(self, state: State) -> int | None:
        """This host's ranks are complete; the run is over when all are."""
        if self._over(state):
            return self._go(self._end)
        return None if self.id in state.round.done else self._repeat()

    def _depart(self, state: State) -> int | None:
        """This agent has to leave; its ranks may save first."""
        ended, verdict = self._ranks.ended(), membership.judge(self._ranks.codes().values())
        in_time = time.monotonic() - self._since < self.options.grace_seconds
        torn = verdict in ("failed", "user_error") or (state.round.number == self._number and state.round.broken)
        if not ended and in_time and not torn:
            return None
        if not ended:
            self._tear()
            self._kill()
        if verdict == "user_error":
            return self._user_error()
        if verdict == "complete" and ended:
            self._finish()
            return self._leave(EXIT_COMPLETE, "complete")
        if verdict == "failed":
            self._tear()
        if self._left == "sigterm" or verdict == "stopped":
            kept = "all ranks have stopped, their state saved" if verdict == "stopped" else "no rank had anything to save"
            return self._leave(EXIT_STOPPED, kept if not self._killed else "ranks were killed; the last checkpoint stands")
        codes = ", ".join(f"{rank}: {code}" for rank, code in self._ranks.codes().items())
        return self._leave(EXIT_FAILED, "the store is gone" + (f", and ranks ended with codes {codes}" if codes else ""))

    # What those have in common.

    def _over(self, state: State) -> bool:
        """Whether the round that this host's ranks belong to has ended, or goes on without it."""
        return state.round.number != self._number or bool(state.round.reports) or self.id not in state.round.active

    def _report(self, reason: Reason, *, rank: int | None = None, tail: str = "") -> None:
        number = self._number
        why = Report(reason, self.host, self._ranks.step(), time.time(), rank, None, tail)
        self._end_by(lambda state: membership.report(state, number, why, self.policy))

    def _finish(self) -> None:
        number = self._number
        self._end_by(lambda state: membership.finish(state, number, self.id))

    def _end_by(self, change: Change) -> None:
        self._said, self._asked = change, time.monotonic()
        self.link.post(change)

    def _repeat(self) -> None:
        """Say it again: it may have got lost with a store that was replaced. The record takes it once."""
        if self._said and self.link.idle and time.monotonic() - self._asked > _AGAIN_SECONDS:
            self._end_by(self._said)

    def _tear(self) -> None:
        number = self._number
        self.link.post(lambda state: membership.tear(state, number))

    def _kill(self) -> None:
        if not self._killed:
            self._killed = time.monotonic()
            self._ranks.kill()

    def _tell_end(self, state: State) -> None:
        for code in self._ranks.codes().values():
            self.metrics.exits.labels(code).inc()
        if state.round.number != self._number or not state.round.reports:
            say(f"round {self._number} goes on without this host; joining again")
            self.metrics.restarts.labels("peer_lost").inc()
            return
        why = state.round.reports[0]
        self.metrics.restarts.labels(why.reason).inc()
        counted = f"; failure {state.budget.failures} of at most {self.policy.max_restarts}" if state.budget.failures else ""
        pause = f"; going on in {state.round.pause_seconds:g} s" if state.round.pause_seconds else ""
        say(f"round {self._number} ended: {why}{counted}{pause}")
        _tell_failure(state)

    def _begin_to_leave(self, reason: Reason, why: str) -> None:
        self._left = reason
        at_work = not self._ranks.ended()
        self._ranks.stop()
        say(f"{why}; " + (f"giving ranks {self.options.grace_seconds:g} s to save" if at_work else "no ranks run here"))
        if reason == "sigterm" and at_work:
            self._report("sigterm")
        self._go(self._depart)

    def _user_error(self) -> int:
        line = self._ranks.user_error()
        self._kill()
        self.link.post(lambda state: membership.close(state, EXIT_USER_ERROR, line))
        return self._close(Closed(EXIT_USER_ERROR, line))

    def _close(self, closed: Closed) -> int:
        """The run is over for everybody."""
        self._kill()
        if closed.code == EXIT_USER_ERROR:
            deadline = time.monotonic() + 2
            while not closed.message and time.monotonic() < deadline:  # rank 0, on another host, is the one that says it
                time.sleep(_TURN_SECONDS)
                closed = self.link.view.state.closed or closed
            with contextlib.suppress(OSError):
                print(closed.message or "error: a rank ended with a user error", file=sys.stderr, flush=True)
            return self._leave(EXIT_USER_ERROR, "a user error; not to be repeated")
        if closed.code == EXIT_COMPLETE:
            return self._leave(EXIT_COMPLETE, "complete")
        _tell_failure(self.link.view.state)
        return self._leave(closed.code, closed.message)

    def _leave(self, code: int, why: str) -> int:
        self.link.post(lambda state: membership.leave(state, self.id, self.policy))
        self.link.flush(3 if self.link.silent_seconds() < 3 else 0)
        say(f"ends with code {code}: {why}")
        return code


def _tell_failure(state: State) -> None:
    """The last lines of the rank that failed first."""
    if first := state.round.first_failure:
        say(f"the first failure: {first}; its last lines:\n{first.tail}")
