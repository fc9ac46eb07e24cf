"""A reader that goes on for long takes no more memory, files, maps or threads than at its beginning."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from programs import ROOT, environment

from personmae.data import order
from personmae.system import mosaic

pytestmark = pytest.mark.integration
EPOCHS = 10
NUM_SAMPLES = 1000
BATCH_SIZE = 16

READER = """
import json, os, sys
from itertools import islice
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader
location, folder, limit, epochs, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5])
def usage():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {
        "anonymous_kib": int(status["RssAnon"].split()[0]),
        "threads": int(status["Threads"]),
        "files": len(os.listdir("/proc/self/fd")),
        "maps": sum(".mds" in line for line in open("/proc/self/maps")),
    }
with ShardSet(location, folder, cache_limit_bytes=limit) as data:
    reader = BatchReader(data, **options)
    for _ in range(epochs):
        keys = [key for batch in islice(reader, reader.steps_per_epoch) for key in batch.keys.tolist()]
        print(json.dumps({"keys": keys, **usage()}), flush=True)
    reader.close()
    print(json.dumps(data.counters.totals()))
"""


def test_ten_epochs_through_a_small_cache_take_no_more_than_two(s3_server, tmp_path: Path) -> None:
    """What is read ahead varies by some shards, and the allocator by a megabyte; anything else would grow by epochs."""
    bucket, num_shards, num_bytes = s3_server.bucket("long"), 0, 0
    for path in write_shards(tmp_path / "set").iterdir():
        s3_server.client.upload_file(str(path), bucket, path.name)
        num_shards += path.suffix == ".mds"
        num_bytes += path.stat().st_size
    assert num_shards > 80
    options = {
        "canvas_size": [128, 64],
        "seed": 3,
        "global_batch_size": BATCH_SIZE,
        "rank": 0,
        "world_size": 1,
        "first_step": 0,
    }
    options |= {"micro_batch_size": BATCH_SIZE, "num_threads": 2, "prefetch_batches": 2, "max_bad_ratio": 0.0}
    options |= {"block_size": BATCH_SIZE, "num_connections": 2}
    arguments = [f"s3://{bucket}", tmp_path / "cache", num_bytes // 10, EPOCHS, json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *epochs, totals = map(json.loads, done.stdout.splitlines())
    assert len(epochs) == EPOCHS
    assert totals["personmae_cache_misses_total"] > 0.8 * EPOCHS * num_shards  # nearly all is fetched anew each time
    for epoch, found in enumerate(epochs):
        possible = order.sample_keys(np.arange(NUM_SAMPLES), seed=3, epoch=epoch).tolist()
        assert len(set(found["keys"])) == len(found["keys"]) == NUM_SAMPLES // BATCH_SIZE * BATCH_SIZE
        assert set(found["keys"]) <= set(possible)
    first, later = epochs[1], epochs[2:]
    assert max(found["threads"] for found in later) <= first["threads"]
    assert max(found["files"] for found in later) <= first["files"] + 16
    assert max(found["maps"] for found in later) <= first["maps"] + 8
    assert max(found["anonymous_kib"] for found in later) < first["anonymous_kib"] + 2 * 1024, [
        found["anonymous_kib"] for found in epochs
    ]


def write_shards(directory: Path) -> Path:
    """Some 100 shards of 10 images, 70 kB each."""
    rng = np.random.default_rng(0)
    new_writer = mosaic.load("streaming.base.format.mds.writer").MDSWriter
    with new_writer(out=str(directory), columns={"jpeg": "bytes"}, hashes=["xxh64"], size_limit=70_000) as writer:
        for _ in range(NUM_SAMPLES):
            _, jpeg = cv2.imencode(".jpg", rng.integers(0, 256, (64, 80, 3), dtype=np.uint8))
            writer.write({"jpeg": jpeg.tobytes()})
    return directory
