"""``personmae pretrain CONFIG --dry-run RANKS``: the data is opened and the plan of the run printed; nothing is trained."""

import tempfile

from personmae import config, dist, hiding, precision
from personmae.data.stream import ShardSet
from personmae.data.synthetic import read_mark
from personmae.model.personmae import View
from personmae.plan import show_plan
from personmae.state import build_model, count_steps


def show(settings: config.Pretrain, world_size: int) -> None:
    """Print what the run would come to on ``world_size`` ranks, and what its masks hide; nothing is written.

    Raises:
        UserError: the data cannot be read, or the ranks cannot share the batch.
    """
    with tempfile.TemporaryDirectory() as cache, ShardSet(settings.data.shards, cache) as shards:
        num_samples, total_steps = len(shards), count_steps(settings, len(shards))
    images = total_steps * settings.train.global_batch_size
    chosen = precision.choose(settings.train.precision, str(dist.read_world().device))
    other = "" if chosen.by_hand else ". Elsewhere auto may choose the other: give train.precision to plan for that machine"
    facts = {
        "size": f"{settings.model.size} at {settings.model.img_size[0]}x{settings.model.img_size[1]}",
        "data": f"{num_samples:,} samples at {settings.data.shards}",
        "run": f"{total_steps:,} steps, {images:,} images, {images / num_samples:.1f} epochs, in {settings.run_dir}",
        "engine": settings.engine.name,
        "precision": str(chosen).removeprefix("precision ") + other,
    }
    view = View(**settings.view_arguments())
    show_plan(
        build_model(settings, chosen),
        view,
        global_batch_size=settings.train.global_batch_size,
        max_micro_batch_size=settings.train.max_micro_batch_size,
        world_size=world_size,
        facts=facts,
        teacher_arguments=settings.teacher_arguments(),
    )
    hiding.show(view, settings.seed, read_mark(settings.data.shards))
