"""One small training run on any engine and any number of ranks: ``python scenario.py PLAN.json`` does a list of them.

A run's parts of every batch follow from seeds, so that all world sizes see the same global batches. ``plain`` is a loop of
its own, without an engine, which the engines are compared with.
"""

import json
import os
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as tdist
from safetensors.torch import load_file, save_file
from torch import Tensor

from personmae import dist, optim
from personmae.checkpoint import host_copy, portable
from personmae.checkpoint.writer import Writer, join_ranks
from personmae.engine.base import Engine, PortableState, own_part
from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher
from personmae.model.vit import grid_coords

ENGINES = ("native", "zero0", "zero1", "zero2", "zero3", "fsdp")
SOME_ENGINES = ("native", "zero2", "zero3", "fsdp")
COMPILED = ("native", "zero2", "fsdp")  # of each kind one; stage 3 refuses
STEPS, MIDDLE = 8, 4
ACCUM, GLOBAL_BATCH, GRID, NUM_VISIBLE = 2, 8, (4, 2), 3
IDENTITY_GROUP = 2  # a micro-batch of two ranks has one, of one rank two
LR, MOMENTUM, BETAS, WEIGHT_DECAY = 1e-3, 0.9, (0.9, 0.95), 0.05
KINDS = ("params", "exp_avg", "exp_avg_sq", "teacher")
Tensors = dict[str, Tensor]


def lr_scale_at(step: int) -> float:
    return 1.0 / (1 + step)


def micro_batch(step: int, micro: int, rank: int = 0, world_size: int = 1) -> Tensors:
    """This rank's samples of a micro-batch; ranks in order make the same samples at every world size."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    count, length = GLOBAL_BATCH // ACCUM, GRID[0] * GRID[1]
    patches_b = torch.randn(count, length, 768, generator=generator)
    patches_a = torch.randn(count, NUM_VISIBLE, 768, generator=generator)
    coords = grid_coords(GRID).expand(count, -1, -1)
    batch = {"patches_a": patches_a, "coords_a": coords[:, :NUM_VISIBLE], "patches_b": patches_b, "coords_b": coords + 0.5}
    share = count // world_size
    return {name: tensor[rank * share : (rank + 1) * share].clone() for name, tensor in batch.items()}


def build_model(activation_checkpointing: str = "none", *, compiled: bool = False, identity: bool = False) -> PersonMAE:
    torch.manual_seed(0)
    model = PersonMAE(size="micro", identity_weight=float(identity), identity_dim=16, identity_group=IDENTITY_GROUP)
    model.encoder.activation_checkpointing = activation_checkpointing  # type: ignore[assignment]
    if compiled:  # what the program does, but for the kernels, which take a minute to build
        model.compile(backend="aot_eager")
    return model


def build_optimizer(model: PersonMAE) -> torch.optim.AdamW:
    return optim.adamw(optim.param_groups(model.named_parameters(), lr=LR, weight_decay=WEIGHT_DECAY), BETAS)


def build_engine(name: str, model: PersonMAE, *, max_norm: float | None, world_size: int) -> Engine:
    plan: dict[str, Any] = {"grad_accum_steps": ACCUM, "max_norm": max_norm}
    if name == "native":
        from personmae.engine.native import NativeEngine

        return NativeEngine(model, build_optimizer(model), **plan)
    if name in ("fsdp", "hsdp"):
        from personmae.engine.fsdp import FsdpEngine

        return FsdpEngine(model, build_optimizer(model), **plan, shard_size=1 if name == "hsdp" else None)
    from personmae.engine.deepspeed import DeepSpeedEngine

    plan |= {"micro_batch_size": GLOBAL_BATCH // ACCUM // world_size, "zero_stage": int(name[-1])}
    # Stage 3 would keep tensors as small as these whole on every rank.
    extra = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if name == "zero3" else {}
    return DeepSpeedEngine(model, build_optimizer(model), **plan, extra=extra)


def run_plain(
    *, max_norm: float | None, poison: dict[str, str], identity: bool = False
) -> tuple[dict[str, Any], dict[int, Tensors]]:
    """The reference: gradients of both micro-batches, AdamW and the average, written out."""
    model = build_model(identity=identity)
    optimizer, teacher = build_optimizer(model), Teacher(model.encoder, GRID, class_token=identity)
    account: dict[str, list[float]] = {"losses": [], "norms": [], "skipped": []}
    states = {}
    for step in range(STEPS):
        for micro in range(ACCUM):
            batch = micro_batch(step, micro)
            batch["target"] = teacher(batch["patches_b"])
            loss = model(batch)["loss"]
            (loss / ACCUM).backward()
            account["losses"].append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = LR * lr_scale_at(step)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        if str(step) not in poison:
            optimizer.step()
            for average, parameter in zip(teacher.encoder.parameters(), model.encoder.parameters(), strict=True):
                average.data.lerp_(parameter.data, 1 - MOMENTUM)
        optimizer.zero_grad()
        account["norms"].append(norm.item())
        account["skipped"].append(float(str(step) in poison))
        if step + 1 in (MIDDLE, STEPS):
            moments = {name: optimizer.state[p] for name, p in model.named_parameters()}
            parts = {
                "params": dict(model.state_dict()),
                "exp_avg": {name: state["exp_avg"] for name, state in moments.items()},
                "exp_avg_sq": {name: state["exp_avg_sq"] for name, state in moments.items()},
                "teacher": dict(teacher.encoder.state_dict()),
            }
            states[step + 1] = flatten(parts, int(next(iter(moments.values()))["step"]))
    return account, states


class Run:
    """One engine with its model and teacher, which can be loaded and trained again and again."""

    def __init__(self, task: dict[str, Any], rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        identity = task["identity"]
        self.model = build_model(task["activation_checkpointing"], compiled=task["compiled"], identity=identity)
        self.teacher = Teacher(self.model.encoder, GRID, class_token=identity)
        self.engine = build_engine(task["engine"], self.model, max_norm=task["max_norm"], world_size=world_size)

    def snapshot(self) -> Tensors | None:
        state = self.engine.portable_state()
        if state is None:
            return None
        parts = {"params": state.params, **state.moments}
        return flatten(parts | {"teacher": dict(self.teacher.encoder.state_dict())}, state.num_updates)

    def load(self, tensors: Tensors) -> None:
        parts, num_updates = unflatten(tensors)
        moments = {kind: parts[kind] for kind in ("exp_avg", "exp_avg_sq")}
        self.engine.load_portable(PortableState(parts["params"], moments, num_updates))
        self.teacher.encoder.load_state_dict(parts["teacher"])

    def train(self, task: dict[str, Any]) -> tuple[dict[str, Any], dict[int, Tensors]]:
        account: dict[str, Any] = {"losses": [], "norms": [], "skipped": [], "untouched": True, "reduced": True}
        states = {}
        if task["load"]:
            loaded = read_flat(task["load"])
            self.load(loaded)
            if (back := self.snapshot()) is not None:
                account["came_back"] = back.keys() == loaded.keys() and all(torch.equal(back[k], loaded[k]) for k in loaded)
        for step in range(task["first"], task["last"]):
            poison = task["poison"].get(str(step))
            before = self.snapshot() if poison else None
            for micro in range(ACCUM):
                batch = micro_batch(step, micro, self.rank, self.world_size)
                spoiled = poison if micro == 0 and self.rank == self.world_size - 1 else None
                if spoiled == "gradient":
                    batch["patches_a"][0, 0, 0] = float("nan")
                batch["target"] = self.teacher(batch["patches_b"])
                if spoiled == "loss":  # smooth L1 has a finite gradient even so
                    batch["target"][0, 0, 0] = float("inf")
                losses = self.engine.forward_backward(batch, last_micro=micro == ACCUM - 1)
                account["losses"].append(dist.mean(losses["loss"]).item())
                account["reduced"] &= all(p.grad is not None for p in self.model.parameters())
            done = self.engine.step(lr_scale_at(step))
            with self.engine.full_params(self.model.encoder) as params:
                self.teacher.update(params, MOMENTUM, done.skipped)
            account["norms"].append(done.grad_norm.item())
            account["skipped"].append(done.skipped.item())
            if poison and (after := self.snapshot()) is not None and before is not None:
                account["untouched"] &= all(torch.equal(before[name], after[name]) for name in before)
            if step + 1 in (MIDDLE, STEPS) and (state := self.snapshot()) is not None:
                states[step + 1] = state
            if step + 1 == MIDDLE and task["together"]:
                self.save_together(Path(task["together"]), task["killed_rank"])
        account["teachers_agree"] = self.agrees([*self.teacher.encoder.parameters()])
        account["skips_agree"] = self.agrees([torch.tensor(account["skipped"])])
        return account, states

    def save_together(self, run_dir: Path, killed_rank: int | None) -> None:
        """Have all ranks write their shares of step MIDDLE, and then of the next, during which one may be killed."""
        state = self.engine.portable_state(spread=True)
        assert state is not None
        tensors = {"params": state.params, **state.moments}
        tensors["teacher"] = own_part(self.teacher.encoder.state_dict(), spread=True)
        record = {"num_updates": state.num_updates}
        with closing(Writer(run_dir, keep_last=2, **join_ranks(run_dir))) as writer:
            writer.save(portable.Checkpoint(MIDDLE, tensors, record), wait=True)
            if killed_rank is None:
                return
            if killed_rank == self.rank:
                host_copy._put = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            writer.save(portable.Checkpoint(MIDDLE + 1, tensors, record))

    def agrees(self, tensors: list[Tensor]) -> bool:
        """Whether all ranks hold the same bits."""
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        first = flat.clone()
        tdist.broadcast(first, src=0)
        return not dist.any_rank(not torch.equal(first, flat))


def flatten(parts: dict[str, Tensors], num_updates: int) -> Tensors:
    flat = {f"{kind}/{name}": t.detach().clone() for kind, tensors in parts.items() for name, t in tensors.items()}
    return flat | {"num_updates": torch.tensor(num_updates)}


def read_flat(where: str) -> Tensors:
    """A state that a run has left: a file of ``flatten``, or a run directory with a checkpoint."""
    if where.endswith(".safetensors"):
        return load_file(where)
    saved = portable.read(portable.locate(where))
    return flatten(saved.tensors, saved.state["num_updates"])


def unflatten(flat: Tensors) -> tuple[dict[str, Tensors], int]:
    parts: dict[str, Tensors] = {kind: {} for kind in KINDS}
    for key, tensor in flat.items():
        if key != "num_updates":
            kind, _, name = key.partition("/")
            parts[kind][name] = tensor
    return parts, int(flat["num_updates"])


def main(plan_file: str) -> None:
    """Do every task of a plan; a task goes on with the engine of the task before it where it can."""
    world = dist.read_world()
    dist.start(world)
    torch.set_num_threads(1)
    run, made_for = None, None
    for task in json.loads(Path(plan_file).read_text()):
        if task["engine"] == "plain":
            account, states = run_plain(max_norm=task["max_norm"], poison=task["poison"], identity=task["identity"])
        else:
            wanted = [task[key] for key in ("engine", "max_norm", "activation_checkpointing", "compiled", "identity")]
            if run is None or made_for != wanted or not task["load"]:
                if run:
                    run.engine.close()
                    run.engine.close()  # as a program may that ends in more than one way
                run, made_for = Run(task, world.rank, world.world_size), wanted
            account, states = run.train(task)
        if world.is_first:
            for step, state in states.items():
                save_file({name: t.contiguous() for name, t in state.items()}, f"{task['out']}-{step}.safetensors")
            Path(f"{task['out']}.json").write_text(json.dumps(account))
    dist.stop()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(sys.argv[1])
