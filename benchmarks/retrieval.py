"""The table of docs/results.md on scoring a retrieval: ``run_retrieval`` at the sizes of Market-1501 and MSMT17.

    python benchmarks/retrieval.py         # ten minutes on 2 idle CPU cores

Features are drawn, so no data set is needed; the time does not depend on them. Writes ``benchmarks/results/retrieval.json``.
"""

import json
from pathlib import Path

from personmae.bench.retrieval import PRESETS, run_retrieval

RESULTS = Path(__file__).resolve().parent / "results" / "retrieval.json"


def main() -> None:
    """Measure one size after the other."""
    records = {name: run_retrieval(bench) for name, bench in PRESETS.items()}
    RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
