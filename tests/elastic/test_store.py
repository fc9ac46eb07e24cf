"""The record that all agents share survives stores and replies that are lost."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from agents import ROOT

from launcher.elastic import membership
from launcher.elastic.membership import Node, Policy, Record, Report
from launcher.elastic.store import Link

POLICY = Policy(1, 2)


@pytest.fixture
def server() -> Any:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def connect(server: Any) -> Iterator[Callable[[str], Link]]:
    links: list[Link] = []

    def connect(name: str) -> Link:
        link = Link(("127.0.0.1", server.port), "run", name, POLICY, keep_alive_seconds=60, settle_seconds=0.1)
        links.append(link)
        link.start()
        return link

    yield connect
    for link in links:
        link.close()
    time.sleep(0.1)


def node(name: str) -> Node:
    return Node(name, name, "127.0.0.1", 1, 1)


def wait_for(what: Callable[[Record], bool], link: Link) -> Record:
    deadline = time.monotonic() + 20
    while not what(link.view.record):
        assert time.monotonic() < deadline, link.view.record
        time.sleep(0.02)
    return link.view.record


def test_a_record_that_a_slower_agent_restored_gives_way_to_the_later_one(server: Any, connect: Callable[[str], Link]) -> None:
    a, b = connect("a"), connect("b")
    for link, name in ((a, "a"), (b, "b")):
        link.post(lambda record, name=name: membership.join(record, node(name)))
    wait_for(lambda record: record.round.number == 1, a)
    wait_for(lambda record: record.round.number == 1, b)
    older = server.get("personmae/run/record")
    a.post(lambda record: membership.report(record, 1, Report("worker_error", "a"), POLICY))
    later = wait_for(lambda record: bool(record.round.reports), a)
    wait_for(lambda record: bool(record.round.reports), b)
    server.set("personmae/run/record", older)  # as an agent does that finds an empty store and has not seen the report
    wait_for(lambda record: record.version > later.version, a)
    for link in (a, b):
        assert wait_for(lambda record: record.version > later.version, link).round.reports == later.round.reports


def test_many_agents_change_the_record_at_once_and_nothing_is_lost(connect: Callable[[str], Link]) -> None:
    links = [connect(str(i)) for i in range(8)]
    for name in range(40):
        links[name % 8].post(lambda record, name=name: membership.join(record, node(str(name))))
    for link in links:
        wait_for(lambda record: len({n.id for n in (*record.waiting, *record.round.nodes)}) == 40, link)


def test_only_the_store_needs_torch() -> None:
    script = (
        "import sys\nimport launcher.elastic.__main__, launcher.elastic.agent, launcher.elastic.ranks\n"
        "import launcher.elastic.traces, launcher.elastic.http, launcher.elastic.store\n"
        "launcher.elastic.__main__.build_parser()\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
