"""What a pre-training says of itself: its set-up, its steps and its end."""

import shlex

import torch
from torch import Tensor

from personmae import config, dist, flops
from personmae.checkpoint import portable
from personmae.checkpoint.writer import Writer
from personmae.data.stream import BatchReader
from personmae.floor import floor_warning
from personmae.guard import Guard
from personmae.model.vit import SIZES
from personmae.monitor import progress, run_log
from personmae.monitor.rank_metrics import RankMetrics
from personmae.pretrain_state import PretrainState, last_step_counted, peak_lr
from personmae.system import storage


def log_setup(state: PretrainState) -> None:
    """Record the run's set-up and print the sizes that follow from it."""
    settings, total_steps = state.settings, state.total_steps
    run_log.record_run(
        settings.run_dir,
        config_yaml=config.dump_yaml(settings),
        config_hash=config.config_hash(settings),
        seed=settings.seed,
        versions=portable.versions(),
        first_step=state.step,
    )
    if settings.data.shards.startswith("s3://"):
        print(f"pretrain: {settings.data.shards} with {storage.s3_identity()}")
    millions = sum(p.numel() for p in state.engine.module.parameters()) / 1e6
    print(f"pretrain: {settings.model.size} ({millions:.1f} M parameters with decoders), {len(state.shards):,} samples")
    if state.start and not state.step:
        print(f"pretrain: {state.start}")
    print(f"pretrain: {state.plan}")
    print(f"pretrain: {state.precision}")
    going = f"resuming at step {state.step} of {total_steps}" if state.step else f"{total_steps} steps"
    print(
        f"pretrain: {going}, peak lr {peak_lr(settings):.3g}, engine {settings.engine.name}, run {settings.run_dir}",
        flush=True,
    )


def log_end(state: PretrainState, seconds: float) -> None:
    """Say where the encoder is, how long that took, what to do with it, and whether it has learned too little."""
    settings, folders = state.settings, portable.folders(state.settings.run_dir)
    where = f"the encoder is in {folders[0] if folders else settings.run_dir}"
    if state.floor and (warning := floor_warning(state.floor, run_log.read_records(settings.run_dir))):
        progress.log_to_stderr(warning)
    progress.log_to_stderr(progress.ending("pretrain", seconds, where, next_command(settings)))


def next_command(settings: config.Pretrain) -> str:
    """The command that puts the encoder to use."""
    return (
        f"personmae finetune configs/finetune_market1501.yaml model.size={settings.model.size} "
        f"init={shlex.quote(settings.run_dir)} root=DATA run_dir=RUN"
    )


def export_plan(state: PretrainState, metrics: RankMetrics, writer: Writer | None, steps_per_epoch: int) -> None:
    """Give Prometheus what is known of a run before its first step."""
    settings, world = state.settings, state.world
    if writer:
        metrics.read_writer(writer.counters.registry)
    if not metrics.run:
        return
    peak = settings.metrics.peak_tflops and 1e12 * settings.metrics.peak_tflops
    if not peak and world.device.type == "cuda":
        peak = flops.peak_flops(torch.cuda.get_device_name(world.device), state.precision.name)
    metrics.run.plan(
        first_step=state.step,
        total_steps=state.total_steps,
        world_size=world.world_size,
        steps_per_epoch=steps_per_epoch,
        checkpoint_steps=settings.checkpoint.every_steps,
        flops_per_image=flops_per_image(settings),
        peak_flops=peak,
    )


def flops_per_image(settings: config.Pretrain) -> float:
    """Operations of a step, for each image."""
    model, width = settings.model, SIZES[settings.model.size]["embed_dim"]
    num_patches = model.img_size[0] * model.img_size[1] // model.patch_size**2
    return flops.pretrain_flops(
        num_visible=num_patches - round(settings.mask.ratio * num_patches),
        num_patches=num_patches,
        patch_size=model.patch_size,
        embed_dim=width,
        depth=SIZES[model.size]["depth"],
        decoder_depth=settings.decoders.depth,
        pixel_dim=settings.decoders.pixel_dim or min(512, width),
        feature_dim=(settings.decoders.feature_dim or width) if settings.loss.feature_weight else None,
        identity_dim=settings.loss.identity_dim if settings.loss.identity_weight else None,
    )


class StepLog:
    """Logs steps: every ``log_every``-th and each with a probe is recorded. Others are shown now and then."""

    def __init__(
        self,
        state: PretrainState,
        log: run_log.RunLog,
        metrics: RankMetrics,
        guard: Guard,
        reader: BatchReader,
        stop: dist.StopSignal,
    ):
        self._state, self._log, self._metrics, self._guard, self._reader = state, log, metrics, guard, reader
        self._stop = stop
        self._first_step, self._num_bad = state.step, 0

    def after(self, losses: dict[str, Tensor], grad_norm: Tensor, lr: float, *, silent: bool, at_checkpoint: bool) -> bool:
        """Log the step that is done. Returns whether it is a ``log_every``-th or the last. Called by all ranks together.

        Args:
            losses: of the step, on the device.
            silent: people have seen nothing for a while.
            at_checkpoint: the state is saved now, so a probe measures it.

        Raises:
            Diverged: too many steps in a row were skipped.
        """
        state = self._state
        step, images_per_step = state.step, state.plan.global_batch_size
        in_turn = step % state.settings.train.log_every == 0 or step == state.total_steps
        prober = state.prober if at_checkpoint or step == state.total_steps else None
        self._log.advance(step)
        probed = prober.run(state.engine, step, self._log, self._metrics, self._stop) if prober else {}
        if in_turn or prober:
            means = mean_over_ranks(losses | {"grad_norm": grad_norm, "skipped_steps": self._guard.num_skipped})
            means |= {"lr": lr, "data_wait": self._reader.share_waited()} | probed
            constants = {"floor_position": state.floor.position, "floor_hue": state.floor.hue} if state.floor else {}
            self._log.record(step, means, images_per_step=images_per_step, constants=constants)
            last_step_counted(self._guard, state)  # like the lines above, the only wait for the device
            self._log_bad_samples()
        elif silent or step == self._first_step + 1:
            means = mean_over_ranks(losses | {"grad_norm": grad_norm}) | {"lr": lr}
            self._log.display(step, means, images_per_step=images_per_step)
        return in_turn

    def _log_bad_samples(self) -> None:
        """Name the unreadable images that were replaced since the last time."""
        new = self._reader.bad_samples[self._num_bad :]
        for where in new:
            print(f"unreadable image replaced: {where}", flush=True)
        self._num_bad += len(new)


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Means of scalars over ranks, read from the device in one copy."""
    stacked = torch.stack([value.float() for value in values.values()])
    return dict(zip(values, dist.mean(stacked).tolist(), strict=True))
