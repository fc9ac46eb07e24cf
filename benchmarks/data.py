"""The table of docs/results.md on reading and decoding: ``personmae bench data`` on ordinary crops, and from a real S3 server.

    python benchmarks/data.py [--work DIR]         # ten minutes on 2 idle CPU cores

Draws 20,000 crops of 150 to 500 pixels height, puts the same shards into a Ceph gateway on loopback where one is installed
(``tests/integration/install_ceph.sh``), and writes ``benchmarks/results/data.json``.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import crops

from personmae.bench.data import DataBench, run_data

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "data.json"
GATEWAY = ROOT / "tests" / "integration" / "ceph_gateway.sh"
KEYS = {"AWS_ACCESS_KEY_ID": "test-access-key", "AWS_SECRET_ACCESS_KEY": "test-secret-key", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def in_store(shards: Path) -> Iterator[str | None]:
    """The location of the same shards in a gateway of our own; None where none is installed."""
    if not shutil.which("radosgw"):
        print("no Ceph gateway is installed: reading from a store is not measured")
        yield None
        return
    with tempfile.TemporaryDirectory() as directory:
        started = subprocess.run([GATEWAY, "start", directory], capture_output=True, text=True, check=True, encoding="utf-8")
        os.environ |= KEYS | {"S3_ENDPOINT_URL": started.stdout.split()[-1]}
        try:
            client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
            client.create_bucket(Bucket="crops")
            for path in sorted(shards.iterdir()):
                client.upload_file(str(path), "crops", f"set/{path.name}")
            yield "s3://crops/set"
        finally:
            subprocess.run([GATEWAY, "stop", directory], check=False, capture_output=True)


def main() -> None:
    """Draw, upload, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench", help="where the crops are kept")
    shards = parser.parse_args().work / "shards"
    crops.write(shards, 20_000)
    with in_store(shards) as remote:
        run_data(DataBench(str(shards), remote, num_images=20_000), RESULTS)


if __name__ == "__main__":
    main()
