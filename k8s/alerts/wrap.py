"""Make prometheusrule.yaml, for the Prometheus Operator, from rules.yaml, for Prometheus: ``python k8s/alerts/wrap.py``."""

from pathlib import Path

import yaml

from personmae.keys.yaml_text import read_documents

HERE = Path(__file__).parent
HEAD = "# Made from rules.yaml by wrap.py.\n"


def wrap(rules: str) -> str:
    """The rules as a PrometheusRule."""
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "personmae", "labels": {"app.kubernetes.io/name": "personmae"}},
        "spec": read_documents(rules, "rules.yaml")[0],
    }
    return HEAD + yaml.safe_dump(rule, sort_keys=False, width=120)


if __name__ == "__main__":
    (HERE / "prometheusrule.yaml").write_text(wrap((HERE / "rules.yaml").read_text(encoding="utf-8")), encoding="utf-8")
