"""The table of docs/results.md on clustering: ``run_cluster`` at the size of Market-1501, and ours at 100,000 images.

    python benchmarks/cluster.py         # five minutes on 2 idle CPU cores

Features are drawn, so no data set is needed. Writes ``benchmarks/results/cluster.json``.
"""

import json
from pathlib import Path

from personmae.bench.cluster import PRESETS, run_cluster

RESULTS = Path(__file__).resolve().parent / "results" / "cluster.json"


def main() -> None:
    """Measure one size after the other."""
    records = {name: run_cluster(bench) for name, bench in PRESETS.items()}
    RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
