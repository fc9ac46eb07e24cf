"""``launcher/pretrain.py`` that leaves in a bucket what each step is trained on, and takes its time; a config map brings it.

``RECORD/ROUND-RANK-WORLD/STEP`` holds the keys of a rank's samples, written before the step. Until ``RECORD/finish`` is
there, a step takes PACE_SECONDS more, and one of the last ten ten times as long, so that the run waits for its test.
"""

import os
import sys
import time
from typing import Any

sys.path.insert(0, os.getcwd())  # a pod's working directory is the checkout

from launcher.cluster import bucket
from launcher.program import main
from personmae import pretrain
from personmae.errors import leave
from personmae.system import storage

_s3 = storage.s3_client()
_bucket, _prefix = bucket.split(os.environ["RECORD"])
_train, _to_device = pretrain.train, pretrain.to_device


def train(state: Any, *args: Any) -> None:
    """The loop, every batch of which is recorded when it is taken."""
    assert state.plan.grad_accum_steps == 1, "a file holds a step"
    number, world = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1, state.world

    def to_device(batch: Any, *where: Any) -> Any:
        key = f"{_prefix}/{number:03}-{world.rank}-{world.world_size}/{state.step:05}"
        _s3.put_object(Bucket=_bucket, Key=key, Body=" ".join(map(str, batch.keys.tolist())).encode())
        if not _s3.list_objects_v2(Bucket=_bucket, Prefix=f"{_prefix}/finish").get("KeyCount"):
            time.sleep(float(os.environ["PACE_SECONDS"]) * (10 if state.step >= state.total_steps - 10 else 1))
        return _to_device(batch, *where)

    pretrain.to_device = to_device
    _train(state, *args)


if __name__ == "__main__":
    pretrain.train = train
    leave(main("pretrain"))
