"""How a rank's numbers get out: to an agent's files, to an endpoint of its own, and to what a complete run leaves behind."""

import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families

from personmae.errors import UserError
from personmae.monitor import heartbeat
from personmae.monitor.exporter import Continued
from personmae.monitor.rank_metrics import RECORD, RankMetrics, StateClock, StepTimer


def values(found: Iterable[Metric]) -> dict[str, float]:
    """Samples by name, those that differ by a label alone added up, without buckets."""
    total: dict[str, float] = {}
    for metric in found:
        for s in metric.samples:
            total[s.name] = total.get(s.name, 0) + s.value
    return total


@pytest.fixture
def rank_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The environment of rank 0 below an agent; returns the agent's directory."""
    for name, value in ((heartbeat.DIRECTORY, str(tmp_path)), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    return tmp_path


def free_port() -> int:
    with socket.create_server(("", 0)) as taken:
        return taken.getsockname()[1]


def fetch(port: int, host: str = "127.0.0.1", path: str = "metrics") -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{host}:{port}/{path}", timeout=5) as answer:
        return answer.read().decode()


def code(port: int, path: str) -> tuple[int, str]:
    """The answer's code and text, also where it is no success."""
    try:
        return 200, fetch(port, path=path)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No agent, one rank."""
    for name in (heartbeat.DIRECTORY, "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_without_an_agent_a_rank_serves_itself_where_a_port_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"metrics.port={port} is taken"):
            RankMetrics("finetune", port=port)
    metrics = RankMetrics("finetune", port=port)
    try:
        metrics.beat("evaluate", 1)
        metrics.count(1, 64)
        text = fetch(port)
    finally:
        metrics.close()
    assert "personmae_samples_total 64.0" in text
    assert 'personmae_run_info{job_kind="finetune"} 1.0' in text
    assert 'personmae_rank_phase{local_rank="0",phase="evaluate"} 1.0' in text
    assert 'personmae_rank_phase{local_rank="0",phase="start"} 0.0' in text
    assert re.search(r'personmae_step_duration_seconds_count\{local_rank="0",part="total",phase="total"\} 1.0', text)
    assert "its parts. Label phase is the old name of part\n" in text
    with socket.create_server(("", port)):  # it is free again
        pass


def test_an_endpoint_is_reached_by_both_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    alone(monkeypatch)
    metrics = RankMetrics("finetune", port=(port := free_port()), host="all")
    try:
        assert "personmae_run_info" in fetch(port)
        assert "personmae_run_info" in fetch(port, "127.0.0.2")
        assert "personmae_run_info" in fetch(port, "[::1]")
    finally:
        metrics.close()


def test_an_endpoint_is_for_its_own_host_unless_all_interfaces_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    metrics = RankMetrics("finetune", port=(port := free_port()))
    try:
        assert "personmae_run_info" in fetch(port)
        with pytest.raises(urllib.error.URLError, match="refused"):
            fetch(port, "127.0.0.2")  # another address of this host, as that of its network is
    finally:
        metrics.close()
    with pytest.raises(UserError, match=r"at metrics\.host=203\.0\.113\.7 \(Cannot assign"):
        RankMetrics("finetune", port=port, host="203.0.113.7")


def test_a_rank_is_healthy_while_it_says_something_new_and_ready_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    metrics = RankMetrics("finetune", port=(port := free_port()))
    try:
        assert (code(port, "healthz"), code(port, "readyz")) == ((200, "ok\n"), (503, "not training\n"))
        metrics.beat("step", 3)
        assert (code(port, "healthz"), code(port, "readyz")) == ((200, "ok\n"), (200, "training\n"))
        monkeypatch.setitem(heartbeat.PATIENCE_SECONDS, "step", 0.0)
        assert code(port, "healthz") == (503, "the rank has said nothing for 0 s in phase step\n")
        metrics.beat("data_wait", 3)
        assert code(port, "healthz") == (200, "ok\n")
        metrics.beat("step", 4)
        metrics.complete()
        assert code(port, "healthz") == (200, "ok\n")
        assert code(port, "nowhere") == (404, "/healthz, /readyz, /metrics\n")
    finally:
        metrics.close()


def test_a_complete_run_lingers_with_its_last_numbers_until_it_is_told_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone(monkeypatch)
    metrics, asked = RankMetrics("finetune", port=(port := free_port()), linger_seconds=60), threading.Event()
    metrics.count(7, 64)
    metrics.complete(str(tmp_path))
    closing = threading.Thread(target=metrics.close, args=(asked.is_set,))
    closing.start()
    time.sleep(0.3)
    text = fetch(port)
    assert "personmae_last_step 7.0" in text
    assert re.search(r"^personmae_run_completed_timestamp_seconds 1\.\d+e\+09$", text, re.MULTILINE)
    asked.set()
    closing.join(timeout=5)
    assert not closing.is_alive()


def test_a_run_that_is_not_complete_does_not_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    metrics = RankMetrics("finetune", port=free_port(), linger_seconds=60)
    start = time.monotonic()
    metrics.close(lambda: False)
    assert time.monotonic() - start < 50  # of the 60 that it would linger


def test_gpus_are_not_asked_where_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    asked: list[bool] = []
    monkeypatch.setattr("personmae.monitor.rank_metrics.gpu_collectors", lambda: asked.append(True) or [])
    RankMetrics("finetune", port=free_port(), gpu=False).close()
    assert not asked
    RankMetrics("finetune", port=free_port()).close()
    assert asked


def test_a_complete_run_leaves_its_numbers_in_its_directory_and_its_store(
    rank_0: Path, tmp_path: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "market-1")
    s3_server.bucket("bucket")
    metrics = RankMetrics("finetune")
    metrics.count(7, 64)
    assert metrics.run
    metrics.run.record(7, {"loss": float("nan")}, 100.0)
    metrics.complete(str(tmp_path), "s3://bucket/runs/market")
    metrics.close()
    text = (tmp_path / RECORD).read_text()
    stored = s3_server.client.get_object(Bucket="bucket", Key=f"runs/market/{RECORD}")["Body"].read()
    assert stored == text.encode()
    found = {metric.name: metric for metric in openmetrics_families(text)}
    (steps,) = found["personmae_steps"].samples
    assert (steps.labels, steps.value) == ({"run": "market-1"}, 1)
    assert float(str(steps.timestamp)) == pytest.approx(time.time(), abs=60)
    assert found["personmae_loss"].samples[0].value != found["personmae_loss"].samples[0].value
    assert {s.labels["local_rank"] for s in found["personmae_step_duration_seconds"].samples} == {"0"}
    assert values(Continued(rank_0).collect())["personmae_steps_total"] == 1  # the agent has the last word, too


def test_a_run_is_complete_though_its_numbers_cannot_be_left(
    rank_0: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = RankMetrics("finetune")
    metrics.complete(str(tmp_path / "nowhere"))
    metrics.close()
    assert "openmetrics.txt is not written" in capsys.readouterr().out
    continued = Continued(rank_0)
    continued.living = True
    assert "personmae_run_completed_timestamp_seconds" in values(continued.collect())


def test_a_run_that_was_complete_already_keeps_the_numbers_that_it_left(
    rank_0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = RankMetrics("finetune")
    metrics.complete()
    metrics.close()
    assert not list(tmp_path.rglob(RECORD))


def test_prometheus_takes_in_what_a_run_has_left(rank_0: Path, tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("needs promtool: tests/integration/install_prometheus.sh")
    metrics = RankMetrics("pretrain")
    metrics.count(1, 64)
    metrics.complete(str(tmp_path))
    metrics.close()
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(tmp_path / RECORD), str(tmp_path / "blocks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "blocks").glob("*/meta.json"))) == 1
    (tmp_path / "blocks/wal").mkdir()
    command = ["promtool", "tsdb", "dump", str(tmp_path / "blocks")]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert '__name__="personmae_steps_total"' in dumped.stdout


def test_labels_and_values_of_every_kind_survive_the_way_to_the_agent(rank_0: Path) -> None:
    odd = 'a "quoted" \\ back\nslash, {é}=1 #'
    registry = CollectorRegistry()
    gauge = Gauge("odd", f"help with {odd}", ["name"], registry=registry)
    for name, value in ((odd, 1.0), ("nan", float("nan")), ("inf", float("-inf")), ("small", 5e-324)):
        gauge.labels(name).set(value)
    metrics = RankMetrics("pretrain")
    metrics.read("odd", registry)
    metrics.close()
    continued = Continued(rank_0)
    continued.living = True
    found = {s.labels["name"]: s.value for m in continued.collect() if m.name == "odd" for s in m.samples}
    assert found.pop("nan") != 0.0
    assert found == {odd: 1.0, "inf": float("-inf"), "small": 5e-324}


def test_a_file_that_a_kill_has_cut_off_is_never_read(rank_0: Path) -> None:
    metrics = RankMetrics("pretrain")
    metrics.count(1, 64)
    metrics.close()
    whole = (rank_0 / "host.metrics").read_bytes()
    (rank_0 / "host.partial").write_bytes(whole[: len(whole) // 2])  # as a kill between the write and the rename leaves it
    assert values(Continued(rank_0).collect())["personmae_steps_total"] == 1


def test_a_file_that_is_written_while_it_is_read_is_read_as_it_was(rank_0: Path) -> None:
    metrics = RankMetrics("pretrain")
    metrics._export.write()
    before = (rank_0 / "host.metrics").read_bytes()
    with open(rank_0 / "host.metrics", "rb", buffering=0) as held:
        read = held.read(100)
        metrics.count(1, 64)
        metrics.close()
        assert read + held.readall() == before


def test_a_clock_that_is_set_back_changes_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    timer, states = StepTimer(registry), StateClock()
    timer.enter("inputs")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    timer.end_step()
    states.enter("train")
    assert 0 <= values(registry.collect())["personmae_step_duration_seconds_sum"] < 5
    assert all(0 <= v < 3600 for v in values(states.collect()).values())
