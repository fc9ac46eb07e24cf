"""A small training script: an all-reduce a step over the real sample order, checkpoints, stops at a boundary.

``worker.py RUN_DIR [STEP_SECONDS]`` goes on until RUN_DIR has a file ``finish``. ``trained-ROUND-RANK-WORLD.txt`` there
lists what each rank of each round trained on, a line a step; ``state.json`` is the checkpoint. A file ``crash`` makes the
last rank fail.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from personmae.data.order import epoch_order, rank_slice
from personmae.monitor.heartbeat import Heartbeat

GLOBAL_BATCH = 12
EVERY_STEPS = 10
ORDER = epoch_order([30] * 40, seed=0, epoch=0, block_size=60)


def batch_at(step: int) -> np.ndarray:
    """The sample ids of a step, all ranks together; the epoch is repeated."""
    start = step * GLOBAL_BATCH % (len(ORDER.ids) - GLOBAL_BATCH)
    return ORDER.ids[start : start + GLOBAL_BATCH]


def next_loss(loss: int, batch_sum: int) -> int:
    """What stands for a model: it depends on all batches so far, and on their order."""
    return (loss * 31 + batch_sum) % 1_000_003


def save(run_dir: Path, step: int, loss: int) -> None:
    partial = run_dir / "state.partial"
    partial.write_text(json.dumps({"step": step, "loss": loss}))
    os.replace(partial, run_dir / "state.json")


def main() -> int:
    heartbeat = Heartbeat()
    run_dir = Path(sys.argv[1])
    step_seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.02
    stop = torch.zeros((), dtype=torch.int64)
    signal.signal(signal.SIGTERM, lambda *_: stop.fill_(1))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_last = rank == world_size - 1
    round_number = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1
    (run_dir / f"pid-{rank}").write_text(str(os.getpid()))
    dist.init_process_group("gloo")
    state = json.loads((run_dir / "state.json").read_text()) if (run_dir / "state.json").exists() else {"step": 0, "loss": 0}
    step, loss = state["step"], state["loss"]
    print(f"rank {rank} of {world_size} begins at step {step}", flush=True)
    with open(run_dir / f"trained-{round_number}-{rank}-{world_size}.txt", "w", buffering=1) as trained:
        while True:
            heartbeat.beat("step", step)
            ids = rank_slice(batch_at(step), rank, world_size)
            finish = torch.tensor(int((run_dir / "finish").exists()))
            values = torch.stack([torch.tensor(int(ids.sum())), stop.clone(), finish])
            dist.all_reduce(values)
            if values[1] or values[2]:
                break
            loss = next_loss(loss, int(values[0]))
            trained.write(" ".join(map(str, [step, *ids])) + "\n")
            step += 1
            if is_last and (run_dir / "crash").exists():
                raise RuntimeError(f"a fault of rank {rank}")
            if rank == 0 and step % EVERY_STEPS == 0:
                save(run_dir, step, loss)
            time.sleep(step_seconds)
    if rank == 0:
        save(run_dir, step, loss)
    dist.barrier()
    dist.destroy_process_group()
    return 75 if values[1] else 0


if __name__ == "__main__":
    sys.exit(main())
