"""What a pre-training run is made of, and its way into a checkpoint and back."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personmae import batch_plan, config, dist
from personmae.checkpoint import commit, portable, remote, resume_point
from personmae.checkpoint.writer import Writer
from personmae.config import RANDOM
from personmae.data.shard_set import ShardSet
from personmae.engine.base import Engine, PortableState, own_part
from personmae.errors import Diverged, UserError
from personmae.floor import Floor
from personmae.guard import Guard
from personmae.model.inputs import RegionSpec
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher
from personmae.precision import Precision
from personmae.pretrain_probe import Prober
from personmae.pretrain_start import Start


@dataclass
class PretrainState:
    """What a run is made of, and how far it has come."""

    settings: config.Pretrain
    world: dist.World
    plan: batch_plan.BatchPlan
    spec: RegionSpec
    shards: ShardSet
    engine: Engine
    teacher: Teacher | None
    total_steps: int
    precision: Precision
    step: int = 0  # updates done
    cursor: int = 0  # global batches of the sample order that are behind. More than ``step`` after a rollback
    loss_ema: float | None = None  # the running mean that the guard against jumps compares with
    prober: Prober | None = None  # what frozen features find, where that is asked for
    floor: Floor | None = None  # what the pixel loss is compared with. On the first rank
    start: Start | None = None  # where the encoder's weights came from


class Spiked(Exception):  # noqa: N818 - it ends an attempt, not the run
    """The loss has jumped. ``good_step`` is the last one at which it had not."""

    def __init__(self, good_step: int):
        self.good_step = good_step


def save(state: PretrainState, writer: Writer | None, *, spread: bool) -> None:
    """Have a checkpoint written, with ``spread`` by all ranks together."""
    saved = to_checkpoint(state, spread=spread)
    if writer and saved:
        writer.save(saved)


def to_checkpoint(state: PretrainState, *, spread: bool = False) -> portable.Checkpoint | None:
    """Everything that a resumed run needs, on the first rank, or each rank's share of it. Called by all ranks together."""
    settings, engine_state = state.settings, state.engine.portable_state(spread=spread)
    if engine_state is None:
        return None
    tensors = {"student": engine_state.params, **engine_state.moments}
    if state.teacher:
        tensors["teacher"] = own_part(state.teacher.encoder.state_dict(), spread=spread)
        if state.teacher.centre is not None:
            tensors["centre"] = own_part(state.teacher.centre.state_dict(), spread=spread)
    record = {
        "total_steps": state.total_steps,
        "images_seen": state.step * settings.train.global_batch_size,
        "cursor": state.cursor,
        "usual_loss": state.loss_ema,
        "floor": state.floor and state.floor._asdict(),
        "num_updates": engine_state.num_updates,
        portable.RESUME_KEY: resume_key(settings, state.shards, state.precision, state.start),
        **state.precision.record(),
        "model": model_record(settings.model) | (state.start.options_record if state.start else {}),
        "config_hash": config.config_hash(settings),
        "versions": portable.versions(),
    }
    return portable.Checkpoint(state.step, tensors, record)


def resume(state: PretrainState) -> Path | None:
    """Take over the newest valid checkpoint of the run, if there is one. Returns where it lies."""
    found = resume_point.newest_for_all(state.settings.run_dir, **state.settings.checkpoint.resume_arguments())
    if not found:
        return None
    saved = found.read()
    theirs = config.Pretrain.resume_key_before() | saved.state.get(portable.RESUME_KEY, {})
    keep_precision(state, theirs.get("train.precision"))
    ours = {"init": RANDOM} | resume_key(state.settings, state.shards, state.precision, state.start)
    theirs = {"init": RANDOM} | theirs
    if differing := [key for key in ours if theirs.get(key) != ours[key]]:
        changed = ", ".join(f"{key}={theirs.get(key)} (now {ours[key]})" for key in differing[:4])
        raise UserError(
            f"{found.path} belongs to a run with other settings: {changed}. Use the same, another run_dir, or "
            "checkpoint.resume=none"
        )
    tensors = dict(saved.tensors)
    student, teacher, centre = (tensors.pop(kind, {}) for kind in ("student", "teacher", "centre"))
    state.engine.load_portable(PortableState(student, tensors, saved.state["num_updates"]))
    if state.teacher:
        portable.load_strictly(state.teacher.encoder, teacher, found.path)
        if state.teacher.centre is not None:
            portable.load_strictly(state.teacher.centre, centre, found.path)
    state.step = saved.step
    state.cursor = saved.state.get("cursor", saved.step)
    state.loss_ema = saved.state.get("usual_loss")
    state.floor = Floor(**saved.state["floor"]) if saved.state.get("floor") else None
    found.log_new_moments(state.step, state.total_steps)
    return found.path


def keep_precision(state: PretrainState, saved: str | None) -> None:
    """Go on in the precision of a checkpoint, unless one is given by hand. Model and teacher read it at each call."""
    state.precision = state.precision.resumed(saved)
    for module in (state.engine.module, state.teacher):
        if module is not None:
            module.compute_dtype = state.precision.dtype


def resume_key(settings: config.Pretrain, shards: ShardSet, precision: Precision, start: Start | None = None) -> dict[str, Any]:
    """What must agree before a run is resumed: settings, what ``auto`` came to, first weights, the data set with its shards."""
    data = {"data.num_samples": len(shards), "data.index": shards.digest}
    first = {"init": start.digest} if start else {}
    return settings.resume_key() | {"train.precision": precision.name} | data | first


def last_step_counted(guard: Guard, state: PretrainState) -> bool:
    """Whether the last step changed the parameters: a state is saved only then. Waits for the device.

    Raises:
        Diverged: too many steps in a row were skipped. The state is kept for a look.
    """
    if guard.exhausted():
        blame, where = guard.blame(), Path(state.settings.run_dir) / "diverged"
        if dumped := to_checkpoint(state):
            with contextlib.closing(Writer(where, keep_last=1)) as writer:
                writer.save(dumped)
        raise Diverged(
            f"the gradient was not finite in {int(guard.consecutive)} steps in a row, up to step {state.step}, which read "
            f"batch {state.cursor - 1} of the order: {blame}. {where} has the state, the run's own checkpoints are from before"
        )
    return not guard.consecutive


def roll_back(state: PretrainState, spike: Spiked, attempt: int) -> Path:
    """Go back to the newest checkpoint from before a spike, and on with the batches behind it (as PaLM's authors did).

    Raises:
        Diverged: there is none, or the loss has jumped too often.
    """
    run_dir, upload_to = state.settings.run_dir, state.settings.checkpoint.upload_to
    at, cursor, most = state.step, state.cursor, state.settings.train.max_rollbacks
    jumped = f"the loss has jumped by step {at}, above {state.settings.train.spike_factor:g} times what it was before"
    if attempt >= most:
        raise Diverged(f"{jumped}, after {most} rollbacks. Lower optim.base_lr, or look at the data")

    def give_up() -> None:
        kept = {*portable.local_steps(run_dir), *_steps_in(upload_to)}
        if not any(step <= spike.good_step for step in kept):
            raise Diverged(
                f"{jumped}, and {run_dir} has no checkpoint from before. Raise checkpoint.keep_last, or log more often"
            )
        _give_up(run_dir, upload_to, [step for step in kept if step > spike.good_step], at)

    dist.on_first_rank(give_up)  # whatever fails there, the others must not wait for it
    loss_ema = state.loss_ema
    found = resume(state)
    if not found:
        raise Diverged(f"{jumped}, and no checkpoint of {run_dir} from before can be read")
    state.loss_ema = loss_ema
    state.cursor = max(cursor, state.cursor)
    if state.world.is_first:
        print(f"{jumped}: back to step {state.step}, and on without the {cursor - state.step} batches since", flush=True)
    return found


def _steps_in(upload_to: str | None) -> list[int]:
    return remote.reaching(lambda: remote.patiently(lambda: remote.steps(upload_to))) if upload_to else []


def _give_up(run_dir: str, upload_to: str | None, steps: list[int], at: int) -> None:
    """Delete what a run has saved since its loss jumped, up to step ``at``. What lies beyond is not its own: moved aside.

    Raises:
        OSError, UserError, Unavailable: the first that cannot be, after all others. The run would go on from it.
    """
    own, beyond = ([step for step in steps if (step <= at) is mine] for mine in (True, False))
    failures: list[Exception] = [*commit.delete(run_dir, own).values(), *commit.set_aside(run_dir, beyond)[1].values()]
    for step in steps if upload_to else ():
        leave = remote.delete if step in own else remote.set_aside
        try:
            remote.reaching(lambda leave=leave, step=step: remote.patiently(lambda: leave(upload_to or "", step)))
        except Exception as error:  # each store's client has errors of its own
            failures.append(error)
    if failures:
        raise failures[0]


def open_writer(settings: config.Pretrain, resumed: Path | None, team: dict[str, Any]) -> Writer:
    """What saves the run's states beside the loop, on the first rank or on all of a ``team``."""
    return Writer(settings.run_dir, resumed=resumed, **settings.checkpoint.writer_arguments(), **team)


def model_record(model: config.Model) -> dict[str, Any]:
    """What must travel with the weights: architecture and preprocessing."""
    return model.model_dump(mode="json")


def build_model(settings: config.Pretrain, chosen: Precision, start: Start | None = None) -> PersonMAE:
    """Student and decoders, freshly initialised. The student's weights are those of ``start`` where there is one."""
    options = start.options if start else None
    model = PersonMAE(**settings.model_arguments(), encoder_options=options, compute_dtype=chosen.dtype)
    if start:
        portable.load_strictly(model.encoder, start.weights, settings.init)
    model.encoder.activation_checkpointing = settings.train.activation_checkpointing
    return model


def count_steps(settings: config.Pretrain, num_samples: int) -> int:
    """``total_steps``, or what ``epochs`` comes to."""
    if settings.train.total_steps:
        return settings.train.total_steps
    if not settings.train.epochs:
        raise UserError("train.epochs or train.total_steps is required. Both are empty")
    return max(1, round(settings.train.epochs * (num_samples // settings.train.global_batch_size)))


def peak_lr(settings: config.Pretrain) -> float:
    """The linear rule of MAE, unless ``optim.lr`` is given."""
    return settings.optim.lr or settings.optim.base_lr * settings.train.global_batch_size / 256


def build_teacher(settings: config.Pretrain, model: PersonMAE, plan: batch_plan.BatchPlan, spec: RegionSpec) -> Teacher | None:
    """The teacher that the losses need, if they need one.

    Raises:
        UserError: the groups of the identity loss do not fill a micro-batch.
    """
    size, group = plan.micro_batch_size, settings.loss.identity_group
    if settings.loss.identity_weight and size % group:
        raise UserError(
            f"loss.identity_group={group} must divide a rank's micro-batch, which is {size} ({plan}). Give another, or another "
            "train.max_micro_batch_size"
        )
    if not model.needs_teacher:
        return None
    teacher = Teacher(model.encoder, spec.grid, model.compute_dtype, **settings.teacher_arguments())
    return teacher.to(model.encoder.cls_token.device)
