"""How a global batch is shared by ranks: micro-batches, accumulation, and the world sizes that can take equal parts."""

from dataclasses import dataclass

from personmae.errors import UserError

_MOST_RANKS = 1024


def admissible_world_sizes(global_batch_size: int, most: int = _MOST_RANKS) -> list[int]:
    """The numbers of ranks that can take equal parts of a global batch."""
    return [n for n in range(1, min(global_batch_size, most) + 1) if global_batch_size % n == 0]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a global batch is split: world_size * grad_accum_steps * micro_batch_size images per step."""

    global_batch_size: int
    world_size: int
    micro_batch_size: int
    grad_accum_steps: int

    def __str__(self) -> str:
        parts = f"{self.world_size} ranks x {self.grad_accum_steps} micro-batches x {self.micro_batch_size} images"
        return f"{self.global_batch_size} images a step = {parts}"


def plan_batch(global_batch_size: int, world_size: int, max_micro_batch_size: int) -> BatchPlan:
    """The largest micro-batch that divides each rank's part evenly.

    Raises:
        UserError: the ranks cannot take equal parts. The world sizes that can are listed.
    """
    if global_batch_size % world_size:
        sizes = [n for n in range(1, 2 * world_size + 1) if global_batch_size % n == 0]
        near = [n * world_size for n in {global_batch_size // world_size, global_batch_size // world_size + 1} if n]
        raise UserError(
            f"train.global_batch_size={global_batch_size} must be a multiple of the world size {world_size}. "
            f"Start {' or '.join(map(str, sizes))} ranks, or set train.global_batch_size to "
            f"{' or '.join(map(str, sorted(near)))}"
        )
    per_rank = global_batch_size // world_size
    micro = max(n for n in range(1, min(per_rank, max_micro_batch_size) + 1) if per_rank % n == 0)
    return BatchPlan(global_batch_size, world_size, micro, per_rank // micro)


def require_equal_parts(batch_size: int, group_size: int, world_size: int) -> None:
    """Raise a UserError unless ranks can take equal parts of a batch, in whole groups of batch normalisation."""
    group = min(group_size, batch_size)
    if batch_size % world_size or batch_size // world_size % group:
        sizes = [n for n in range(1, batch_size // group + 1) if batch_size % (n * group) == 0]
        start = f"Start {' or '.join(map(str, sizes))}, or give" if sizes else "Give"
        near = [n for n in range(2, batch_size // world_size + 1) if batch_size % (n * world_size) == 0]
        best = sorted(near, key=lambda n: abs(n - group))[:2]
        such = f"such as {' or '.join(map(str, sorted(best)))} " if best else ""
        raise UserError(
            f"a batch of {batch_size} images in groups of train.bn_group_size={group} must be shared evenly by {world_size} "
            f"rank{'s' * (world_size > 1)}. {start} another train.bn_group_size {such}(only equal ones compare)"
        )
