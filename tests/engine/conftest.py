"""Runs of the scenario, done once in a few starts of real processes: all of them, or one of each kind."""

from typing import Any

import pytest
from engine_runs import MAX_NORM, POISONED, Results, launch, task_of
from scenario import COMPILED, ENGINES, MIDDLE, SOME_ENGINES


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("engines")

    def task(name: str, engine: str, **settings: Any) -> dict[str, Any]:
        return task_of(name, engine, folder, **settings)

    def all_runs(engine: str, ranks: int) -> list[dict[str, Any]]:
        return [
            task(f"{engine}-{ranks}", engine),
            task(f"{engine}-{ranks}-clipped", engine, max_norm=MAX_NORM, poison=POISONED),
        ]

    def continued(name: str, engine: str, origin: str) -> dict[str, Any]:
        return task(name, engine, load=str(folder / f"{origin}-{MIDDLE}.safetensors"), first=MIDDLE)

    plain = [task("plain", "plain"), task("plain-clipped", "plain", max_norm=MAX_NORM, poison=POISONED)]
    one = [run for engine in ENGINES for run in all_runs(engine, 1)]
    launch(plain + one, 1, folder)
    two = [run for engine in (*ENGINES, "hsdp") for run in all_runs(engine, 2)]
    two += [
        task(f"{engine}-2-{mode}", engine, activation_checkpointing=mode, last=MIDDLE)
        for engine in ENGINES
        for mode in ("selective", "full")
    ]
    two += [task(f"{engine}-2-compiled", engine, compiled=True, last=MIDDLE) for engine in COMPILED]
    two += [continued(f"{a}-1-then-{b}-2", b, f"{a}-1") for a, b in zip(ENGINES, ENGINES[1:] + ENGINES[:1], strict=True)]
    launch(two, 2, folder)
    launch([continued(f"{a}-2-then-{b}-1", b, f"{a}-2") for b in ENGINES for a in ENGINES], 1, folder)
    return Results(folder)


@pytest.fixture(scope="session")
def some_results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The plain loop, an engine of each kind on two ranks, and one that goes on from another's state."""
    folder = tmp_path_factory.mktemp("some_engines")
    clipped: dict[str, Any] = {"max_norm": MAX_NORM, "poison": POISONED}
    plain = [task_of("plain", "plain", folder), task_of("plain-clipped", "plain", folder, **clipped)]
    launch([*plain, task_of("plain-identity", "plain", folder, identity=True)], 1, folder)
    two = [task_of(f"{engine}-2", engine, folder) for engine in SOME_ENGINES]
    two += [task_of(f"{engine}-2-clipped", engine, folder, **clipped) for engine in SOME_ENGINES]
    two += [task_of(f"{engine}-2-identity", engine, folder, identity=True) for engine in SOME_ENGINES]
    launch(two, 2, folder)
    pairs = zip(SOME_ENGINES, SOME_ENGINES[1:] + SOME_ENGINES[:1], strict=True)
    names = [(f"{a}-2-then-{b}-1", b, str(folder / f"{a}-2-{MIDDLE}.safetensors")) for a, b in pairs]
    launch([task_of(name, engine, folder, load=load, first=MIDDLE) for name, engine, load in names], 1, folder)
    return Results(folder)
