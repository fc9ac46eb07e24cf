"""Features of many images with their names, into one file. Killed at any moment, the same call goes on and ends alike.

The images are listed and cut into parts of a few hundred. Each part is computed by one process and has a file of its own in
``OUT.partial``. When all are there they are joined into OUT, and the folder goes.
"""

import json
import math
import multiprocessing
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from personmae import dist
from personmae.data import rejects
from personmae.data.import_workers import kept_when_stopped, workers
from personmae.data.rejects import Reject
from personmae.errors import UserError
from personmae.system import files
from personmae.weights import feature_file
from personmae.weights.encoder import Encoder
from personmae.weights.extract_images import Images, open_images
from personmae.weights.extract_parts import PART_IMAGES, Settings, Task, compute, read_part, read_rejects, write_part
from personmae.weights.feature_file import Rows
from personmae.weights.loading import load_for_command
from personmae.weights.staging import partial_folder, partial_of, require_free

PLAN: Final = "plan.json"
_FORMAT: Final = 2  # one more with each rule of what a file of features holds
_FEW_IMAGES, _SMALL_PART = 4096, 64  # so that a short work is shared by all cores too
_WORTH_STARTING: Final = 10.0  # seconds of work for one process, above which others save more than their start costs
_BATCH: Final = {"cpu": 64, "cuda": 256}
Progress = Callable[[int, int], None]


class NothingReadable(UserError):  # noqa: N818 - what was found
    """None of the images could be read. ``rejects`` has all of them."""

    def __init__(self, message: str, rejects: list[Reject]):
        super().__init__(message)
        self.rejects = rejects


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an extraction ended."""

    num_images: int
    dim: int
    rejects: list[Reject]
    passed_over: str = ""
    was_complete: bool = False


@dataclass(frozen=True)
class Plan:
    """Which images make which part, and all that decides what the result is."""

    images: Images
    num_images: int
    settings: Settings
    dim: int
    part_images: int
    record: dict[str, Any]

    @property
    def num_parts(self) -> int:
        return math.ceil(self.num_images / self.part_images)

    def of_part(self, number: int) -> range:
        start = number * self.part_images
        return range(start, min(start + self.part_images, self.num_images))


def run(
    source: str | Images,
    out: Path,
    *,
    model: str,
    boxes: Path | None = None,
    column: str | None = None,
    precision: str = "fp32",
    device: str | None = None,
    num_processes: int | None = None,
    max_rejects: float = 0.05,
    unfinished: bool = False,
    progress: Progress = lambda done, total: None,
    log: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Write features of all images of ``source`` to ``out``, by the model at ``model``. It may be images that are open.

    ``out`` ends in .parquet or .npy. An image that cannot be read is left out and listed in ``OUT.rejects.jsonl``.
    ``num_processes`` is one a core by default, or one a GPU, and fewer for little work. ``progress(done, total)`` counts
    images.

    Raises:
        UserError: an option is out of range, there are no images or no model, ``out`` exists or cannot be written to, or an
            unfinished extraction of other images or another model is there.
        Stopped: Ctrl-C, SIGTERM or the loss of a process ended it. Parts that are finished stay.
        TooManyRejects: more than the share ``max_rejects`` was left out. What is finished stays.
    """
    feature_file.require_suffix(out)
    rejects.check_share(max_rejects)
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--processes must be at least 1, got {num_processes}")
    left = partial_of(out) / PLAN
    if not (out.exists() and left.exists()):  # else it was killed when all but the last step was done
        require_free(out)
    if out.suffix.lower() == ".npy" and not left.exists():
        require_free(feature_file.ids_beside(out))
    with kept_when_stopped():
        encoder = load_for_command(model, log, device=device, unfinished=unfinished)
        settings = _settings(model, encoder, precision, num_processes, unfinished)
        opened = open_images(source, boxes=boxes, column=column, log=log) if isinstance(source, str) else source
        plan = make_plan(encoder, settings, opened)
        with partial_folder(out, keep=True) as folder:
            return _carry_out(plan, out, folder, num_processes, max_rejects, progress)


def features_of(encoder: Encoder, images: Images, *, batch_size: int = 64) -> torch.Tensor:
    """Features (N, D) of images by a model that is loaded already, by the code of the parts.

    Raises:
        UserError: an image cannot be read.
    """
    settings = Settings(encoder.config["source"], str(encoder.device), "fp32", batch_size, dist.usable_cores())
    found = compute(settings, images)
    if found.rejects:
        raise UserError(f"whole images are required. Left out: {rejects.summary(found.rejects)}")
    return torch.from_numpy(found.features)


def make_plan(encoder: Encoder, settings: Settings, images: Images) -> Plan:
    """The plan, with the record of all that must agree before an unfinished extraction goes on."""
    num_images = len(images.ids)
    size = _SMALL_PART if num_images <= _FEW_IMAGES else PART_IMAGES
    record = {
        "format": _FORMAT,
        "images": images.digest(),
        "num_images": num_images,
        "model": digest(encoder),
        "precision": settings.precision,
        "device": encoder.device.type,
        "batch_size": settings.batch_size,
        "part_images": size,
    }
    return Plan(images, num_images, settings, encoder.config["dim"], size, record)


def digest(encoder: Encoder) -> str:
    """A number for a model's tensors and its preprocessing."""
    found = xxhash.xxh3_128()
    for name, tensor in sorted(encoder.model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(memoryview(tensor.cpu().contiguous().numpy()).cast("B") if tensor.numel() else b"")
    kept = {name: value for name, value in encoder.config.items() if name != "source"}
    found.update(json.dumps(kept, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _usual_processes(device: torch.device) -> int:
    """One a GPU, or one a core."""
    return torch.cuda.device_count() if device.type == "cuda" else dist.usable_cores()


def _settings(model: str, encoder: Encoder, precision: str, processes: int | None, unfinished: bool) -> Settings:
    kind = encoder.device.type
    threads = 1 if kind == "cpu" else max(1, dist.usable_cores() // (processes or _usual_processes(encoder.device)))
    return Settings(model, str(encoder.device), precision, _BATCH.get(kind, 64), threads, unfinished)


def _carry_out(plan: Plan, out: Path, folder: Path, processes: int | None, max_rejects: float, progress: Progress) -> Outcome:
    """Do what is not done yet."""
    _begin(plan, folder)
    if not out.exists():
        _fill(plan, folder, processes, progress)
        left_out, was_complete = _left_out(plan, folder), False
        _end(plan, out, folder, left_out, max_rejects)
    else:
        progress(plan.num_images, plan.num_images)
        left_out, was_complete = _left_out(plan, folder), True
    shutil.rmtree(folder)
    return Outcome(plan.num_images - len(left_out), plan.dim, left_out, plan.images.passed_over, was_complete)


def _left_out(plan: Plan, folder: Path) -> list[Reject]:
    """The images of all parts that could not be read, in order."""
    return [reject for number in range(plan.num_parts) for reject in read_rejects(_part(folder, number))]


def _begin(plan: Plan, folder: Path) -> None:
    """Write the plan, or find that the one that is there is the same."""
    path = folder / PLAN
    if not path.exists():
        files.replace(path, json.dumps(plan.record, indent=1))
        return
    before = json.loads(path.read_bytes())
    if differing := [name for name in plan.record if before.get(name) != plan.record[name]]:
        changes = ", ".join(f"{name}={before.get(name)} (now {plan.record[name]})" for name in differing)
        raise UserError(
            f"{folder} belongs to an extraction that was not finished, of other images or another model: {changes}. Run that "
            "one again to finish it, delete the folder, or choose another OUT"
        )


def _fill(plan: Plan, folder: Path, processes: int | None, progress: Progress) -> None:
    """Compute all parts that have no file yet. Without a number of ``processes`` others are started when that is worth it."""
    missing = [number for number in range(plan.num_parts) if not _part(folder, number).exists()]
    done = plan.num_images - sum(len(plan.of_part(number)) for number in missing)
    progress(done, plan.num_images)
    began, in_the_beginning = time.monotonic(), len(missing)
    while missing and processes is None and _is_short(plan, in_the_beginning, len(missing), time.monotonic() - began):
        done += write_on_own_gpu(_task(plan, folder, missing.pop(0)))
        progress(done, plan.num_images)
    wanted = min(processes or _usual_processes(torch.device(plan.settings.device)), max(1, len(missing)))
    with workers(wanted, preload="personmae.weights.extract_parts") as pool:
        for future in as_completed([pool.submit(write_on_own_gpu, _task(plan, folder, number)) for number in missing]):
            done += future.result()
            progress(done, plan.num_images)


def _is_short(plan: Plan, parts: int, left: int, seconds: float) -> bool:
    """Whether this process alone ends soon, by what the first of ``parts`` took. ``left`` of them are to be done."""
    if plan.num_images > _FEW_IMAGES:
        return False
    return left == parts or left * seconds / (parts - left) < _WORTH_STARTING


def _task(plan: Plan, folder: Path, number: int) -> Task:
    return Task(plan.settings, plan.images.part(plan.of_part(number)), _part(folder, number))


def write_on_own_gpu(task: Task) -> int:
    """As ``write_part``, on one GPU of several by the number of this process."""
    if task.settings.device == "cuda":
        device = gpu_of(multiprocessing.current_process().name, torch.cuda.device_count())
        task = task._replace(settings=replace(task.settings, device=device))
    return write_part(task)


def gpu_of(process: str, num_gpus: int) -> str:
    """The device of a process by the number in its name, which counts from 1."""
    match = re.search(r"(\d+)$", process)
    return f"cuda:{(int(match[1]) - 1) % num_gpus if match and num_gpus else 0}"


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.npz"


def _end(plan: Plan, out: Path, folder: Path, left_out: list[Reject], max_rejects: float) -> None:
    """Join the parts. What was left out is listed beside the result."""
    if len(left_out) == plan.num_images:
        shutil.rmtree(folder)
        raise NothingReadable(
            f"images that can be decoded are required. All {len(left_out):,} of {plan.images.location} were left out: "
            f"{rejects.summary(left_out)}",
            left_out,
        )
    lines = "".join(f"{json.dumps(reject)}\n" for reject in left_out)
    if left_out:
        files.replace(folder / rejects.REJECTS, lines)
        rejects.check(left_out, plan.num_images, max_rejects, str(folder))
        files.replace(rejects_beside(out), lines)
    num_rows = plan.num_images - len(left_out)
    about = {name: plan.record[name] for name in ("format", "model", "precision")} | {"dim": plan.dim}
    feature_file.write(out, folder, _rows(plan, folder), num_rows=num_rows, dim=plan.dim, about=about)


def rejects_beside(out: Path) -> Path:
    """The list of images that were left out."""
    return out.with_name(f"{out.name}.{rejects.REJECTS}")


def _rows(plan: Plan, folder: Path) -> Iterator[Rows]:
    """The rows of each part that has any."""
    for number in range(plan.num_parts):
        found, images = read_part(_part(folder, number)), plan.images.part(plan.of_part(number))
        if not found.kept.any():
            continue
        ids = [name for name, kept in zip(images.ids, found.kept, strict=True) if kept]
        columns = {
            name: [value for value, kept in zip(values, found.kept, strict=True) if kept]
            for name, values in images.columns.items()
        }
        yield Rows(ids, columns, found.features)
