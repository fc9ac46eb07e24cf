"""Alerts and dashboards: every alert fires when it should and not otherwise, and nothing asks for what is not exported."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemas
import yaml

ROOT = Path(__file__).resolve().parents[2]
ALERTS, BOARD = ROOT / "k8s/alerts", ROOT / "k8s/dashboards/personmae.json"
RULES = yaml.safe_load((ALERTS / "rules.yaml").read_text())
TESTS = yaml.safe_load((ALERTS / "tests.yaml").read_text())
NAMES = [rule["alert"] for group in RULES["groups"] for rule in group["rules"]]

Build = Callable[[Path], dict[tuple[str, str], dict[str, Any]]]


def promtool(*args: str | Path) -> subprocess.CompletedProcess[str]:
    if not shutil.which("promtool"):
        pytest.skip("needs promtool: tests/integration/install_prometheus.sh")
    return subprocess.run(["promtool", *map(str, args)], capture_output=True, text=True, timeout=60, check=False)


def exported() -> dict[str, str]:
    """Types by name, as docs/metrics.md has them."""
    rows = re.findall(r"^\| `(personmae_\w+)` \| (\w+) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    return dict(rows)


def unknown(expressions: list[str]) -> set[str]:
    """Names that are asked for and not exported; a histogram has three."""
    known = set()
    for name, kind in exported().items():
        known |= {f"{name}_{suffix}" for suffix in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    asked = {name for text in expressions for name in re.findall(r"\bpersonmae_\w+", text)}
    assert asked
    return asked - known


def test_the_rules_are_rules() -> None:
    done = promtool("check", "rules", ALERTS / "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_not_otherwise() -> None:
    done = promtool("test", "rules", ALERTS / "tests.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_an_alert_is_tried_both_ways_with_another_run_beside_it(name: str) -> None:
    tried = [(test, part) for test in TESTS["tests"] for part in test["alert_rule_test"] if part["alertname"] == name]
    assert any(part["exp_alerts"] for _, part in tried)
    assert any(not part["exp_alerts"] for _, part in tried)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("expression", ["vector(1) > 2", "vector(1)"])
def test_an_alert_that_never_fires_or_always_does_is_found(name: str, expression: str, tmp_path: Path) -> None:
    (rule,) = (rule for group in RULES["groups"] for rule in group["rules"] if rule["alert"] == name)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [rule | {"expr": expression}]}]}))
    tests = []
    for test in TESTS["tests"]:
        parts = [part for part in test["alert_rule_test"] if part["alertname"] == name]
        tests += [test | {"alert_rule_test": parts}] if parts else []
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(TESTS | {"tests": tests}))
    done = promtool("test", "rules", tmp_path / "tests.yaml")
    assert done.returncode != 0
    assert "exp:" in done.stdout + done.stderr


def test_alerts_and_the_dashboard_ask_for_what_is_exported_alone() -> None:
    board = json.loads(BOARD.read_text())
    asked = [t["expr"] for panel in board["panels"] for t in panel.get("targets", [])]
    assert unknown(asked) == set()
    patterns = re.compile(r'__name__=~"personmae_\(last_checkpoint\|first\)_step"')
    alerts = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    assert any(patterns.search(text) for text in alerts)
    assert {"personmae_last_checkpoint_step", "personmae_first_step"} <= set(exported())
    assert unknown([patterns.sub("", text) for text in alerts]) == set()


def test_the_dashboard_shows_training_data_elasticity_and_gpus() -> None:
    board = json.loads(BOARD.read_text())
    assert [panel["title"] for panel in board["panels"] if panel["type"] == "row"] == ["Training", "Data", "Elasticity", "GPUs"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_dashboard_can_be_imported_and_fills_its_choice_of_runs_by_itself() -> None:
    board = json.loads(BOARD.read_text())
    assert {"title", "uid", "schemaVersion", "time", "templating", "panels"} <= board.keys()
    assert "id" not in board  # a number of the server that it was saved on
    source, namespace, run = board["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (namespace["name"], run["name"]) == ("namespace", "run")
    for choice in (namespace, run):
        assert (choice["refresh"], choice["multi"], choice["includeAll"]) == (2, True, True)
        assert unknown([choice["query"]]) == set()
    assert namespace["allValue"] == ".*"  # where there is no such label too
    shown = [panel for panel in board["panels"] if panel["type"] != "row"]
    for panel in shown:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    places = [tuple(panel["gridPos"][side] for side in "xy") for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_every_curve_is_of_the_chosen_runs_and_named_by_labels_that_it_has() -> None:
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| ([\w, ]*)\|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    labels = {name: {label.strip() for label in found.split(",")} for name, found in rows}
    board = json.loads(BOARD.read_text())
    for target in (target for panel in board["panels"] for target in panel.get("targets", [])):
        text = target["expr"]
        names = re.findall(r"personmae_\w+", text)
        assert len(re.findall(r'personmae_\w+\{namespace=~"\$namespace",run=~"\$run"', text)) == len(names), text
        kept = [set(re.split(r", ?", group)) for group in re.findall(r"\bby \(([\w, ]+)\)", text)]
        base = re.sub(r"_(bucket|sum|count)$", "", names[0])
        has = set.union(*kept) if kept else {"run", "instance", "node_rank"} | labels.get(names[0], labels.get(base, set()))
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= has, text


def test_the_operators_rule_is_made_from_the_rules() -> None:
    namespace: dict[str, Any] = {"__file__": str(ALERTS / "wrap.py"), "__name__": "wrap"}
    exec(compile((ALERTS / "wrap.py").read_text(), "wrap.py", "exec"), namespace)
    assert (ALERTS / "prometheusrule.yaml").read_text() == namespace["wrap"]((ALERTS / "rules.yaml").read_text()), (
        "run python k8s/alerts/wrap.py"
    )


def test_kustomize_makes_the_rule_and_the_config_map(
    kustomize: Callable[[Path], dict[tuple[str, str], dict[str, Any]]],
) -> None:
    rule = kustomize(ALERTS)["PrometheusRule", "personmae"]
    assert rule["spec"] == RULES
    if schemas.have_custom():
        schemas.check_custom(rule)
    board = kustomize(BOARD.parent)["ConfigMap", "personmae-dashboard"]
    assert board["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(board["data"]["personmae.json"]) == json.loads(BOARD.read_text())
