"""ReID without labels: clusters of the pictures' features are their classes, found anew before every epoch (arXiv 2103.11568).

From a pre-trained encoder this is unsupervised learning (USL); from one fine-tuned on another benchmark it is unsupervised
domain adaptation (UDA), which uses no source picture. True identities are read for the log alone.
"""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae import archive, checkpoint, config, dist, metrics, optim
from personmae.engine.base import Engine, PortableState
from personmae.engine.native import NativeEngine
from personmae.errors import Stopped, UserError
from personmae.guard import Guard
from personmae.heartbeat import Heartbeat
from personmae.keeper import Schedule, Writer, finish
from personmae.model.vit import SIZES, VisionTransformer
from personmae.reid import cluster, retrieval
from personmae.reid.datasets import Benchmark, describe, load_benchmark, pids_and_camids
from personmae.reid.features import extract, standardise_per_camera
from personmae.reid.heads import Neck, ReIDModel, encoder_weights, trained_size
from personmae.reid.memory import ClusterMemory, mean_centroids
from personmae.reid.sampler import cluster_batches
from personmae.reid.transforms import ImageSet, augment, draw_augmentation


@dataclass
class Run:
    """What a run is made of, and how far it has come; ``labels`` are the clusters of the epoch that ``step`` is in."""

    settings: config.Unsupervised
    world: dist.World
    benchmark: Benchmark
    module: "ClusterContrast"
    model_settings: dict[str, Any]  # architecture and preprocessing, which travel with the weights
    engine: Engine
    step: int = 0
    labels: np.ndarray | None = None

    @property
    def total_steps(self) -> int:
        return self.settings.train.epochs * self.settings.train.iters_per_epoch


def run(settings: config.Unsupervised) -> None:
    """Train all epochs, resuming what the run directory holds, then evaluate; writes ``result.json``.

    Raises:
        UserError: the configuration, the weights or the benchmark cannot be used, or there are too few clusters.
        Stopped: a signal asked for it; the state is saved.
        Diverged: gradients are no longer finite.
    """
    world = dist.read_world()
    heartbeat = Heartbeat()
    dist.require_equal_parts(
        settings.batch.num_ids * settings.batch.num_instances, settings.train.bn_group_size, world.world_size
    )
    if settings.checkpoint.resume == "auto" and retrieval.has_record(settings.run_dir, run_hash(settings)):
        if world.is_first:
            print(f"{settings.run_dir} is complete", flush=True)
        return
    stop = dist.StopSignal()
    dist.start(world)
    benchmark = load_benchmark(settings.benchmark, settings.root, train_on_val=settings.train_on_val)

    torch.manual_seed(settings.seed)
    module, model_settings = build(settings)
    module.to(world.device).train()
    state = Run(settings, world, benchmark, module, model_settings, build_engine(settings, module))
    held = checkpoint.lock(settings.run_dir) if world.is_first else None  # before anything there is renamed or fetched
    try:
        found = resume(state) if settings.checkpoint.resume == "auto" else None
        if world.is_first:
            announce(state)
        log = metrics.RunLog(
            settings.run_dir,
            is_first=world.is_first,
            title="unsupervised",
            total_steps=state.total_steps,
            first_step=state.step,
        )
        with contextlib.closing(log):
            train(state, found, log, heartbeat, stop)
            state.engine.close()
            heartbeat.beat("evaluate", state.step)
            evaluate(state, log)
    finally:
        dist.stop()
        if held:
            held.close()


def train(state: Run, found: Path | None, log: metrics.RunLog, heartbeat: Heartbeat, stop: dist.StopSignal) -> None:
    """The loop: from the state that was ``found``, or from the start, to the last step."""
    settings, world, engine, total_steps = state.settings, state.world, state.engine, state.total_steps
    pool = ThreadPoolExecutor(dist.threads_per_rank(world))
    images = ImageSet([sample.path for sample in state.benchmark.train], settings.model.img_size, pool=pool)
    writer = Writer(settings.run_dir, resumed=found, **settings.checkpoint.writer_arguments()) if world.is_first else None
    schedule = Schedule(**settings.checkpoint.schedule_arguments())
    guard = Guard(world.device, max_skipped_steps=settings.train.max_skipped_steps)
    size = settings.batch.num_ids * settings.batch.num_instances
    ours = dist.share(size)
    try:
        for chosen, labels in batches(state, images, log, heartbeat):
            heartbeat.beat("step", state.step)
            torch.manual_seed(settings.seed + 1000003 * state.step + world.rank)  # of drop path, so a resumed run repeats it
            drawn = draw_augmentation(
                size, settings.model.img_size, seed=settings.seed, step=state.step, **settings.augment.model_dump()
            )
            pictures = augment(
                images.load(chosen[ours]),
                drawn.part(ours),
                mean=state.model_settings["mean"],
                std=state.model_settings["std"],
                pad=settings.augment.pad,
            )
            batch = {"images": pictures.to(world.device), "labels": labels[ours]}
            outputs = engine.forward_backward(batch, last_micro=True)
            lr_scale = lr_scale_at(settings, state.step)
            _, skipped = engine.step(lr_scale)
            guard.note(outputs["loss"], skipped)
            # By the global batch in its order, so that the memory is the same for any number of ranks.
            state.module.memory.update(dist.gather_rows(outputs["features"], size), labels)
            state.step += 1

            log.advance(state.step)
            if state.step % settings.train.log_every == 0 or state.step == total_steps:
                values = {"loss": dist.mean(outputs["loss"]).item(), "lr": lr_scale * settings.optim.lr}
                log.log(state.step, values, images_per_step=size)
            timed = writer is not None and not writer.busy and schedule.by_time(writer.seconds_since_save)
            stopping, timed = dist.any_ranks(stop.requested, timed)
            if (stopping or timed or schedule.by_step(state.step) or state.step == total_steps) and guard.last_counted(
                state.step, settings.run_dir
            ):
                heartbeat.beat("checkpoint", state.step)
                save(state, writer)
            if stopping and state.step < total_steps:
                stop.settle()
                finish(writer)
                raise Stopped(
                    f"at step {state.step} of {total_steps}, state saved in {settings.run_dir}; run this again to go on"
                )
        finish(writer)
    finally:
        pool.shutdown(cancel_futures=True)
        if writer:
            writer.close()  # last: it may raise


class ClusterContrast(nn.Module):
    """A ReID model and the loss of its features against a memory of clusters, which must be set before the first step.

    ``forward`` takes ``images`` (B, 3, H, W), normalised, and ``labels`` (B,).
    """

    def __init__(self, model: ReIDModel, *, compute_dtype: torch.dtype):
        super().__init__()
        self.model, self.compute_dtype = model, compute_dtype
        self.memory: ClusterMemory

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images = batch["images"]
        with torch.autocast(images.device.type, self.compute_dtype, self.compute_dtype != torch.float32):
            (embedding,) = self.model(images)["embeddings"]
        features = F.normalize(embedding.float(), dim=1)
        return {"loss": self.memory.loss(features, batch["labels"]), "features": features}


def batches(state: Run, images: ImageSet, log: metrics.RunLog, heartbeat: Heartbeat) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Pictures (P * K,) and clusters (P * K,) of every global batch that is left, clustering at the start of each epoch."""
    settings, camids = state.settings, pids_and_camids(state.benchmark.train)[1]
    per_epoch = settings.train.iters_per_epoch
    while state.step < state.total_steps:
        epoch, done = divmod(state.step, per_epoch)
        if done == 0 or state.labels is None:
            heartbeat.beat("evaluate", state.step)
            find_clusters(state, images, epoch, log)
        assert state.labels is not None
        planned = cluster_batches(
            state.labels,
            camids,
            num_ids=settings.batch.num_ids,
            num_instances=settings.batch.num_instances,
            num_batches=per_epoch,
            seed=settings.seed,
            epoch=epoch,
        )
        labels = torch.from_numpy(state.labels)
        for chosen in planned[done:]:
            yield chosen, labels[chosen].to(state.world.device)


def find_clusters(state: Run, images: ImageSet, epoch: int, log: metrics.RunLog) -> None:
    """Label the pictures by the clusters of their features, and begin the memory with the clusters' means.

    Raises:
        UserError: there are fewer clusters than a batch needs.
    """
    settings, model = state.settings, state.module.model
    dist.average_buffers(model)
    features = extract(
        model,
        images,
        batch_size=settings.train.extract_batch_size,
        device=state.world.device,
        mean=state.model_settings["mean"],
        std=state.model_settings["std"],
        dtype=state.module.compute_dtype,
    )
    pids, camids = pids_and_camids(state.benchmark.train)
    found = torch.zeros(len(images), dtype=torch.int64)
    if state.world.is_first:
        compared = standardise_per_camera(features, camids) if settings.cluster.per_camera else features
        options = settings.cluster.model_dump(exclude={"per_camera"})
        found = torch.from_numpy(cluster.pseudo_labels(compared.to(state.world.device), **options))
    state.labels = dist.broadcast(found).numpy()
    quality = cluster.quality(state.labels, pids)
    told = {name: value for name, value in asdict(quality).items() if value is not None}
    log.say(f"epoch {epoch}: " + "  ".join(f"{name} {value:.4g}" for name, value in told.items()))
    if state.world.is_first:
        with (Path(settings.run_dir) / "clusters.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": epoch, "step": state.step, **told}) + "\n")
    if quality.num_clusters < settings.batch.num_ids:
        raise UserError(
            f"batch.num_ids={settings.batch.num_ids} clusters a batch are required, and epoch {epoch} has "
            f"{quality.num_clusters} with {quality.num_outliers} of {len(state.labels)} pictures in none; "
            f"raise cluster.eps={settings.cluster.eps:g}, lower batch.num_ids, or start from a better encoder"
        )
    centroids = mean_centroids(features.to(state.world.device), torch.from_numpy(state.labels).to(state.world.device))
    state.module.memory = ClusterMemory(centroids, **settings.memory.model_dump())


def build(settings: config.Unsupervised) -> tuple[ClusterContrast, dict[str, Any]]:
    """The module, and the preprocessing that belongs to its weights."""
    model_settings = settings.model.model_dump(mode="json")
    encoder = VisionTransformer(
        **SIZES[settings.model.size],
        patch_size=settings.model.patch_size,
        drop_path_rate=settings.train.drop_path_rate,
    )
    weights, record = read_start(settings.init)
    for key in ("size", "patch_size"):
        if record[key] != model_settings[key]:
            raise UserError(
                f"model.{key}={model_settings[key]} must be that of {settings.init}, which is {record[key]}; "
                f"give model.{key}={record[key]}"
            )
    checkpoint.load_strictly(encoder, weights, settings.init)
    known = record.get("trained_size", record["img_size"])
    model_settings |= {"mean": record["mean"], "std": record["std"], "trained_size": known}
    head = Neck(encoder, pool=settings.feature.pool, bn_group_size=settings.train.bn_group_size)
    dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
    module = ClusterContrast(ReIDModel(encoder, head, trained_size=trained_size(model_settings)), compute_dtype=dtype)
    return module, model_settings


def read_start(init: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The encoder of a fine-tuned run (for UDA) or of a pre-trained one (for USL), and the settings that belong to it."""
    path = checkpoint.locate(init)
    if weights := checkpoint.read_kind(path, "model"):
        settings = json.loads((path / checkpoint.STATE).read_bytes())["model"]
        return encoder_weights({name.removeprefix("model."): tensor for name, tensor in weights.items()}), settings
    return checkpoint.read_encoder(init)


def build_engine(settings: config.Unsupervised, module: ClusterContrast) -> Engine:
    """The plain engine with SGD."""
    groups = optim.param_groups(module.named_parameters(), lr=settings.optim.lr, weight_decay=settings.optim.weight_decay)
    optimizer = optim.sgd(groups, settings.optim.momentum)
    return NativeEngine(module, optimizer, grad_accum_steps=1, max_norm=settings.optim.max_norm)


def lr_scale_at(settings: config.Unsupervised, step: int) -> float:
    """The step's share of the first learning rate: ``decay`` for each ``decay_every_epochs``."""
    epoch = step // settings.train.iters_per_epoch
    return settings.optim.decay ** (epoch // settings.optim.decay_every_epochs)


def save(state: Run, writer: Writer | None) -> None:
    """Have a checkpoint written; here stands everything that a resumed run needs. Called by all ranks together."""
    dist.average_buffers(state.module)  # running statistics of what each rank has seen
    saved = state.engine.portable_state()
    if not writer or saved is None:
        return
    assert state.labels is not None
    clusters = {"labels": torch.from_numpy(state.labels), "centroids": state.module.memory.centroids}
    record = {
        "total_steps": state.total_steps,
        "num_updates": saved.num_updates,
        "num_classes": 0,
        "init": state.settings.init,
        "head": {"kind": "neck", "pool": state.settings.feature.pool},
        "model": state.model_settings,
        "run_hash": run_hash(state.settings),
        "versions": checkpoint.versions(),
    }
    tensors = {"model": saved.params, **saved.moments, "clusters": clusters}
    writer.save(checkpoint.Checkpoint(state.step, tensors, record))


def resume(state: Run) -> Path | None:
    """Take over the newest valid checkpoint of the run, if there is one; returns where it lies."""
    found = archive.newest_for_all(state.settings.run_dir, state.settings.checkpoint.store)
    if not found:
        return None
    saved = checkpoint.read(found)
    if saved.state.get("run_hash") != run_hash(state.settings):
        raise UserError(
            f"{found} was trained with another configuration; use the same, another run_dir, or checkpoint.resume=none"
        )
    tensors = dict(saved.tensors)
    clusters = tensors.pop("clusters")
    state.engine.load_portable(PortableState(tensors.pop("model"), tensors, saved.state["num_updates"]))
    state.step, state.labels = saved.step, clusters["labels"].numpy()
    state.module.memory = ClusterMemory(clusters["centroids"].to(state.world.device), **state.settings.memory.model_dump())
    return found


def run_hash(settings: config.Unsupervised) -> str:
    """Digest of the configuration and of the weights that the run starts from."""
    return config.config_hash(settings) + checkpoint.digest(checkpoint.locate(settings.init))


def announce(state: Run) -> None:
    """Record the run's set-up and print the sizes that follow from it."""
    settings, total_steps = state.settings, state.total_steps
    metrics.record_run(
        settings.run_dir,
        config_yaml=config.dump_yaml(settings),
        config_hash=config.config_hash(settings),
        seed=settings.seed,
        versions=checkpoint.versions(),
    )
    described = describe(state.benchmark)
    print(described.table, described.note, sep="\n")
    millions = sum(p.numel() for p in state.module.parameters()) / 1e6
    going = f"resuming at step {state.step} of {total_steps}" if state.step else f"{total_steps} steps"
    print(
        f"unsupervised: {settings.model.size} ({millions:.1f} M parameters) from {settings.init}, {going}, "
        f"peak lr {settings.optim.lr:.3g}, run {settings.run_dir}",
        flush=True,
    )


def evaluate(state: Run, log: metrics.RunLog) -> None:
    """Measure the last epoch, the only one that is measured, and write the record into the run; by all ranks together."""
    settings, kept = state.settings, state.model_settings
    features = retrieval.model_features(state.module.model, mean=kept["mean"], std=kept["std"], device=state.world.device)
    record = retrieval.measure(
        state.benchmark,
        features,
        img_size=settings.model.img_size,
        num_threads=dist.threads_per_rank(state.world),
        device=state.world.device,
    )
    if record is None:
        return
    record |= {"name": Path(settings.run_dir).name, "init": settings.init, "commit": metrics.git_commit()}
    record["run_hash"] = run_hash(settings)
    retrieval.write_record(Path(settings.run_dir), record)
    log.say(retrieval.table_row(record))
