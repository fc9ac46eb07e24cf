"""One row of the contract in docs/operations.md after the other: real agents and stores, ranks that are a few lines each."""

import ast
import inspect
import os
import re
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import warm
from agents import Start

from launcher.elastic import agent as agent_module
from launcher.elastic import membership
from launcher.elastic.__main__ import build_parser
from launcher.elastic.agent import EXIT, TRANSITIONS, Agent, State
from launcher.elastic.membership import Node, Record
from launcher.elastic.options import read_options, read_policy
from launcher.elastic.ranks import Limits
from launcher.elastic.store import StoreView
from personmae.errors import UserError

pytestmark = pytest.mark.integration


WAIT = """
import os, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(time.time()))
print("ready", os.getpid(), flush=True)
while not stop: time.sleep(0.01)
"""


def test_complete_ranks_end_the_agent_with_0_and_know_who_they_are(start: Start, tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR"]
    script = f"import os; print(*(os.environ[n] for n in {names}), os.environ['MASTER_PORT'] > '0')"
    agent = start(script, "--nproc-per-node", "2", "--log-dir", str(tmp_path / "logs"))
    assert agent.code() == 0
    for rank in range(2):
        line = f"{rank} {rank} 2 2 0 127.0.0.1 True"
        assert f"[{rank}] {line}\n" in agent.output()
        assert (tmp_path / f"logs/round-1-rank-{rank}.log").read_text() == line + "\n"


def test_a_signal_reaches_all_ranks_while_all_are_alive_and_a_second_one_none(start: Start, tmp_path: Path) -> None:
    wait = f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
    script = f"{WAIT}print('at', stop[0], flush=True)\n{wait}\nprint('times', len(stop)); sys.exit(75)"
    agent = start(script, "--nproc-per-node", "3")
    agent.wait_for("ready", 3)
    agent.process.terminate()
    agent.wait_for(r"at (\S+)", 3)  # none of them ends before all have it
    agent.process.send_signal(signal.SIGINT)
    agent.process.terminate()
    time.sleep(0.5)
    (tmp_path / "go").touch()
    assert agent.code() == 75
    assert re.findall(r"times (\d)", agent.output()) == ["1"] * 3
    assert "all ranks have stopped, their state saved" in agent.output()


def test_ranks_that_do_not_stop_within_the_grace_are_killed_with_their_children(start: Start) -> None:
    script = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n{WAIT}"
    agent = start(f"{script}print('child', p.pid, flush=True); time.sleep(99)", "--grace-seconds", "1")
    agent.wait_for("ready")
    agent.process.terminate()
    (child,) = agent.wait_for(r"child (\d+)")
    assert agent.code() == 75
    assert "ranks were killed; the last checkpoint stands" in agent.output()
    assert not is_alive(int(child))


def test_ranks_do_not_outlive_a_killed_agent(start: Start) -> None:
    agent = start(WAIT)
    (rank,) = agent.wait_for(r"ready (\d+)")
    agent.process.kill()
    agent.process.wait()
    deadline = time.monotonic() + 5
    while is_alive(int(rank)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(int(rank))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_rank_that_the_signal_finds_already_ending_has_stopped_too(start: Start) -> None:
    agent = start("import time; print('ready'); time.sleep(99)")  # no handler, as in an interpreter that is ending
    agent.wait_for("ready")
    agent.process.terminate()
    assert agent.code() == 75
    assert "all ranks have stopped" in agent.output()


def test_a_signal_before_any_rank_runs_ends_the_agent_with_75(start: Start) -> None:
    agent = start(WAIT, "--nnodes", "2")
    agent.wait_for("1 of at least 2 nodes are here")
    agent.process.terminate()
    assert agent.code() == 75


def test_a_user_error_ends_all_agents_with_78_and_its_line_is_printed_by_each(start: Start) -> None:
    script = (
        "import os, sys, time\nif os.environ['RANK'] == '0': print('error: x=1 must be 2', file=sys.stderr); sys.exit(78)\n"
        "time.sleep(99)"
    )
    agents = [start(script, "--nnodes", "2") for _ in range(2)]
    assert [agent.code() for agent in agents] == [78, 78]
    for agent in agents:
        assert re.findall("^error: .*$", agent.output(), re.MULTILINE) == ["error: x=1 must be 2"]


def test_failures_without_progress_end_all_agents_with_1_and_the_first_traceback_comes_last(start: Start) -> None:
    script = "import os, time\nif os.environ['RANK'] == '1': raise RuntimeError('a fault')\ntime.sleep(99)"
    agents = [start(script, "--nnodes", "2", "--max-restarts", "1") for _ in range(2)]
    assert [agent.code() for agent in agents] == [1, 1]
    for agent in agents:
        assert re.search(
            r"round 1 ended: worker_error: rank 1 on \S+ ended with code 1, .*failure 1 of at most 1", agent.output()
        )
        end = agent.output().splitlines()[-8:]
        assert "[elastic] RuntimeError: a fault" in end
        assert "ends with code 1: 2 failures without progress" in end[-1]


def test_stops_without_progress_become_counted_failures(start: Start) -> None:
    agent = start("import sys; sys.exit(75)", "--max-restarts", "1")
    assert agent.code() == 1
    assert len(re.findall(r"round \d+ ended: stopped", agent.output())) == 3  # of four; two of them free
    assert "2 failures without progress, the last is stopped" in agent.output()


def test_an_agent_that_stays_alone_gives_up_with_1(start: Start) -> None:
    agent = start("", "--nnodes", "2", "--join-seconds", "6")
    assert agent.code() == 1
    assert "no round came together within 6 s: 1 of at least 2 nodes are here" in agent.output()


def test_an_inadmissible_world_waits(start: Start) -> None:
    agent = start("", "--nproc-per-node", "3", "--admissible-batch", "2", "--join-seconds", "6")
    assert agent.code() == 1
    assert "3 ranks cannot share a batch of 2; more or fewer nodes are needed" in agent.output()


def test_an_inadmissible_world_runs_the_largest_part_that_is_admissible(start: Start) -> None:
    script = "import os; print('world', os.environ['WORLD_SIZE'])"
    agent = start(script, "--nproc-per-node", "3", "--admissible-batch", "2", "--inadmissible", "subset")
    assert agent.code() == 0
    assert re.findall(r"world (\d)", agent.output()) == ["2", "2"]
    assert "1 more would not divide 2" in agent.output()


def test_a_hang_is_found_by_its_phase_and_restarted(start: Start) -> None:
    script = (
        "import os, time\nfrom personmae.monitor.heartbeat import Heartbeat\nbeats = Heartbeat()\n"
        "print('begun', flush=True)\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n    beats.beat('checkpoint', 5)\n    time.sleep(99)"
    )
    agent = start(script, "--step-seconds", "99", "--checkpoint-seconds", "1")
    assert agent.code() == 0
    assert "in phase checkpoint" in agent.output()
    assert re.search(r"traces of rank 0, .* state S", agent.output())
    assert "round 1 ended: hang: rank 0" in agent.output()
    assert len(re.findall(r"\[0\] begun", agent.output())) == 2


def test_a_rank_that_hangs_before_its_first_heartbeat_is_found(start: Start) -> None:
    script = "import os, time\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': time.sleep(99)"
    agent = start(script, "--start-seconds", "1")
    assert agent.code() == 0
    assert "in phase start; a script that sends no heartbeats needs --start-seconds inf" in agent.output()
    assert "round 1 ended: hang: rank 0" in agent.output()


def test_a_host_that_was_asleep_takes_no_rank_for_hung(start: Start) -> None:
    script = (
        f"from personmae.monitor.heartbeat import Heartbeat\nbeats = Heartbeat(); beats.beat('step', 3)\n{WAIT}sys.exit(75)"
    )
    script = script.replace("time.sleep(0.01)", "(time.sleep(0.01), beats.beat('step', 3))")
    agent = start(script, "--step-seconds", "3.5", "--store-seconds", "3.5")
    (rank,) = map(int, agent.wait_for(r"ready (\d+)"))
    asleep = [agent.process.pid, rank]
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    time.sleep(1)
    assert agent.process.poll() is None, agent.output()
    agent.process.terminate()
    assert agent.code() == 75
    assert "hang" not in agent.output()
    assert "silent" not in agent.output()


def test_an_agent_says_that_its_store_does_not_answer(start: Start) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        agent = start("", "--store", f"127.0.0.1:{port}", "--store-seconds", "4")
        agent.wait_for(f"waiting: the store at 127.0.0.1:{port} does not answer")
        assert agent.code() == 1


def test_a_report_that_got_lost_with_its_store_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    args = build_parser().parse_args(["run", "--", "sh", "-c", "exit 1"])
    agent = Agent(read_options(args), policy := read_policy(args), Limits())
    alone = membership.join(Record(), Node(agent.id, "here", "127.0.0.1", 1, 1))
    running = membership.form(alone, policy, settled=True)
    agent.link.view = StoreView(running)  # its link is not started: what is posted stays in the queue
    for _ in range(2):
        deadline = time.monotonic() + 20
        while agent.link.idle and time.monotonic() < deadline:
            assert agent._once() is None
            time.sleep(0.02)
        (change,) = agent.link._queue
        assert [report.reason for report in change(running).round.reports] == ["worker_error"]
        agent.link._queue.clear()  # it has arrived, and is gone with the store


def calls_of(method: str, seen: set[str]) -> list[ast.Call]:
    """Every call in a method of ``Agent`` and in the methods of its own that it calls."""
    seen.add(method)
    tree = ast.parse(inspect.getsource(agent_module))
    (found,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == method]
    calls = [n for n in ast.walk(found) if isinstance(n, ast.Call)]
    names = [n.func.attr for n in calls if isinstance(n.func, ast.Attribute) and ast.unparse(n.func.value) == "self"]
    more = [name for name in names if name in vars(Agent) and name not in {"_go", "_leave"}]
    return calls + [call for name in more if name not in seen for call in calls_of(name, seen)]


@pytest.mark.parametrize("state", State)
def test_the_table_of_transitions_has_what_the_code_does_and_nothing_else(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    args = build_parser().parse_args(["run", "--", "sh"])
    handler = Agent(read_options(args), read_policy(args), Limits())._handlers[state].__name__
    texts = [ast.unparse(call) for call in calls_of(handler, set())]
    reached = {State[name] for text in texts for name in re.findall(r"^self\._go\(State\.(\w+)\)$", text)}
    assert reached == TRANSITIONS[state].keys() - {EXIT}
    assert any(text.startswith("self._leave(") for text in texts) == (EXIT in TRANSITIONS[state])


def test_a_transition_that_the_table_does_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    args = build_parser().parse_args(["run", "--", "sh"])
    agent = Agent(read_options(args), read_policy(args), Limits())
    with pytest.raises(AssertionError, match=r"WAITING.*PAUSING.*is not in TRANSITIONS"):
        agent._go(State.PAUSING)
    agent._go(State.LEAVING)  # from everywhere
    assert agent.state is State.LEAVING


def test_health_and_metrics_outlive_the_ranks(start: Start, tmp_path: Path) -> None:
    port = 20000 + os.getpid() % 9000
    script = (
        "import os, time\nfrom personmae.monitor.heartbeat import Heartbeat\nbeats = Heartbeat()\nbeats.beat('step', 7)\n"
        "print('begun', flush=True)\ntime.sleep(0.5)\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': raise SystemExit(3)\ntime.sleep(99)"
    )
    agent = start(script, "--port", str(port))
    agent.wait_for(r"^\[0\] begun", 2)
    time.sleep(0.5)
    assert ask(port, "/healthz") == (200, "ok\n")
    assert ask(port, "/readyz")[0] == 200
    code, text = ask(port, "/metrics")
    assert code == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["personmae_world_size"] == "1.0"
    assert values["personmae_nodes"] == "1.0"
    assert values["personmae_last_step"] == "7.0"
    assert values['personmae_restarts_total{reason="worker_error"}'] == "1.0"
    assert values['personmae_rank_exits_total{code="3"}'] == "1.0"
    assert values["personmae_rendezvous_duration_seconds_count"] == "2.0"
    assert 0 < float(values['personmae_heartbeat_age_seconds{local_rank="0"}']) < 10
    assert ask(port, "/other")[0] == 404


def test_an_agent_that_is_stuck_or_without_its_store_is_sick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    args = build_parser().parse_args(["run", "--store-seconds", "60", "--", "sh"])
    agent = Agent(read_options(args), read_policy(args), Limits())
    assert agent.probes().sick == ""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    assert agent.probes().sick == "the store has been silent for 100 s"
    monkeypatch.setattr(time, "monotonic", lambda: now + 200)
    assert agent.probes().sick == "the agent has been stuck for 200 s"


def ask(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_taken_port_is_a_user_error(store: str, start: Start) -> None:
    port = store.rpartition(":")[2]
    done = warm.run(["-m", "launcher.elastic", "store", "--port", port])
    assert done.returncode == 78
    assert done.stderr.splitlines()[-1].startswith(f"error: the store needs port {port}")
    agent = start("", "--port", port)
    assert agent.code() == 78
    assert f"error: --port {port} is taken" in agent.output()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "a script is required"),
        (["run", "--", "nowhere/x.py"], "script 'nowhere/x.py' cannot be found"),
        (["run", "--", "no-such-command"], "'no-such-command' cannot be found"),
        (["run", "--nnodes", "2:1", "--", "sh"], "--nnodes must be N or MIN:MAX"),
        (["run", "--nnodes", "two", "--", "sh"], "--nnodes must be N or MIN:MAX"),
        (["run", "--store", "29400", "--", "sh"], "--store must be HOST:PORT"),
        (["run", "--nproc-per-node", "0", "--", "sh"], "--nproc-per-node must be at least 1"),
    ],
)
def test_a_wrong_command_line_is_a_user_error(arguments: list[str], message: str) -> None:
    args = build_parser().parse_args(arguments)
    with pytest.raises(UserError, match=message):
        print(read_options(args), read_policy(args))


def test_an_unknown_option_ends_with_78(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["run", "--nothing", "--", "x.py"])
    assert caught.value.code == 78
    assert "--nothing" in capsys.readouterr().err
