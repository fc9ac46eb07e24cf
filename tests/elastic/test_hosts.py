"""Three hosts with a rank each, and two with two: lost, told to stop and in the wrong number. On loopback, without torch.

tests/integration/test_elastic.py has the same of two hosts in networks of their own, with torch's collectives.
"""

import itertools
import re
import signal
import sys
import time
from pathlib import Path

import light_worker
import pytest
from agents import ROOT, Start, Started

pytestmark = pytest.mark.integration
QUICK = ["--settle-seconds", "1", "--keep-alive-seconds", "3"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def command(run_dir: Path) -> list[str]:
    return [sys.executable, str(ROOT / "tests/elastic/light_worker.py"), str(run_dir)]


def wait_for_world(run_dir: Path, world_size: int, agents: list[Started], after: int = 0) -> int:
    """Wait for a round beyond ``after`` whose ranks have all trained 12 steps; its number."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        files = [f for f in run_dir.glob(f"trained-*-*-{world_size}.txt") if f.read_text().count("\n") > 12]
        rounds = [int(f.stem.split("-")[1]) for f in files]
        if found := [n for n in rounds if n > after and rounds.count(n) == world_size]:
            return max(found)
        time.sleep(0.05)
    raise TimeoutError("\n".join(agent.output() for agent in agents))


def steps_lost(run_dir: Path) -> list[int]:
    """Steps that each round did again. That every step had all its samples, each once, is checked here."""
    rounds: dict[int, dict[int, list[list[int]]]] = {}
    for file in run_dir.glob("trained-*.txt"):
        number, rank, _ = map(int, file.stem.split("-")[1:])
        rounds.setdefault(number, {})[rank] = [list(map(int, line.split())) for line in file.read_text().splitlines()]
    spans = []
    for _, ranks in sorted(rounds.items()):
        whole = min(len(lines) for lines in ranks.values())  # of the last step, a killed rank may not have told
        for lines in zip(*(lines[:whole] for lines in ranks.values()), strict=True):
            step = lines[0][0]
            first = step * light_worker.GLOBAL_BATCH
            assert {line[0] for line in lines} == {step}
            assert sorted(itertools.chain(*(line[1:] for line in lines))) == list(
                range(first, first + light_worker.GLOBAL_BATCH)
            )
        if whole:
            spans.append((ranks[0][0][0], max(lines[-1][0] for lines in ranks.values()) + 1))
    assert spans[0][0] == 0
    assert spans[-1][1] == int((run_dir / "state").read_text())
    return [before[1] - after[0] for before, after in itertools.pairwise(spans)]


def finish(run_dir: Path, agents: list[Started]) -> None:
    (run_dir / "finish").touch()
    assert [agent.code() for agent in agents] == [0] * len(agents), "\n".join(agent.output() for agent in agents)


def first_host(agents: list[Started]) -> int:
    """Which agent has rank 0, GROUP_RANK 0 that is."""
    return next(i for i, agent in enumerate(agents) if re.search(r"^\[0\] begins", agent.output(), re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "ranks"), [(3, 1), (2, 2)])
def test_the_host_of_rank_0_is_killed_replaced_and_another_is_told_to_stop(
    hosts: int, ranks: int, start: Start, run_dir: Path
) -> None:
    def join() -> Started:
        return start(command(run_dir), *QUICK, "--nnodes", f"1:{hosts}", "--nproc-per-node", str(ranks))

    agents = [join() for _ in range(hosts)]
    full, less = hosts * ranks, (hosts - 1) * ranks
    number = wait_for_world(run_dir, full, agents)

    lost = agents.pop(first_host(agents))
    lost.process.kill()
    number = wait_for_world(run_dir, less, agents, number)
    agents.append(join())
    number = wait_for_world(run_dir, full, agents, number)

    stopped = agents.pop()
    stopped.process.terminate()
    assert stopped.code() == 75
    number = wait_for_world(run_dir, less, agents, number)
    finish(run_dir, agents)

    killed, *rest = steps_lost(run_dir)
    assert 0 <= killed <= light_worker.EVERY_STEPS
    assert rest == [0] * len(rest)
    assert not re.search("failure", "".join(agent.output() for agent in agents))  # nothing was charged


@pytest.mark.slow
def test_of_three_hosts_in_an_inadmissible_world_one_is_spare_and_steps_in(start: Start, run_dir: Path) -> None:
    options = [*QUICK, "--nnodes", "1:3", "--nproc-per-node", "2", "--admissible-batch", "4", "--inadmissible", "subset"]
    agents = [start(command(run_dir), *options) for _ in range(3)]
    number = wait_for_world(run_dir, 4, agents)
    assert all("2 more would not divide 4" in agent.output() for agent in agents)
    (spare,) = [
        i for i, agent in enumerate(agents) if f"round {number}: 4 ranks" in agent.output() and "; 0 here" in agent.output()
    ]

    extra = agents.pop(spare)
    extra.process.kill()  # nobody misses it
    time.sleep(5)
    assert not any(f"round {number} ended" in agent.output() for agent in agents)

    agents.append(start(command(run_dir), *options))
    agents[-1].wait_for("runs without this host")
    agents.pop(first_host(agents)).process.kill()
    wait_for_world(run_dir, 4, agents, number)
    finish(run_dir, agents)
    assert max(steps_lost(run_dir)) <= light_worker.EVERY_STEPS


@pytest.mark.slow
def test_a_spare_host_waits_for_longer_than_it_would_for_a_first_round(start: Start, run_dir: Path) -> None:
    first = start(command(run_dir), *QUICK)
    wait_for_world(run_dir, 1, [first])
    spare = start(command(run_dir), *QUICK, "--join-seconds", "1")
    spare.wait_for("runs without this host")
    time.sleep(2.5)
    assert spare.process.poll() is None, spare.output()
    first.process.send_signal(signal.SIGTERM)
    assert first.code() == 75
    wait_for_world(run_dir, 1, [spare], 1)
    finish(run_dir, [spare])
    assert steps_lost(run_dir) == [0]
