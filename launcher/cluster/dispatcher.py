"""``python -m launcher.cluster.dispatcher PLAN``: a suite's pod, which creates a stage once the encoder it needs is complete.

What has become of a stage is kept in the config map SUITE-state, so a new pod goes on where the last one was, and a stage that
was deleted is not created again. A stage owns all its objects: its Job is created first, suspended, and the others are owned
by it. The pod may get and create what a stage is made of, and patch Jobs and that config map.
"""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launcher.cluster import bucket, suite
from launcher.cluster.api import Api, Away, Cluster, Refused
from launcher.cluster.deployed import finished
from launcher.cluster.kustomization import Object
from personmae.errors import EXIT_STOPPED, UserError, run_program

PAUSE_SECONDS = 30.0  # between two looks at the stages
PATIENCE_SECONDS = 900.0  # so long a refusal may be one that passes: servers restart, and policies are corrected
_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 2.0, 60.0
_INCOMPLETE = "personmae/incomplete"  # an annotation of a Job that waits for the other objects of its stage
Stage = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Dispatch the plan that the command line names; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
    path = Path((sys.argv[1:] if argv is None else argv)[0])
    return run_program(lambda: run(json.loads(path.read_text(encoding="utf-8")), Api()))


def run(
    plan: dict[str, Any], cluster: Cluster, pause_seconds: float = PAUSE_SECONDS, patience_seconds: float = PATIENCE_SECONDS
) -> None:
    """Create what can be created until all stages are over, then write the table.

    Raises:
        UserError: a stage has failed, or the cluster goes on refusing; the table says which, and has the others.
    """
    if plan.get("version") != suite.PLAN_VERSION:
        raise UserError(
            f"a plan of version {suite.PLAN_VERSION} is required and this one has {plan.get('version', 1)}: the image and the "
            "personmae that submitted the suite differ. Submit it again with an image of the same version."
        )
    stages = Stages(plan, cluster, patience_seconds)
    printed, misses = "", 0
    while not stages.over:
        try:
            stages.turn()
            line, pause, misses = ", ".join(f"{name} {state}" for name, state in stages.states.items()), pause_seconds, 0
        except (Away, Refused) as error:
            if stages.gives_up(error):
                _write_table(plan, stages.given_up(error))
            line, pause = f"the cluster did not answer, or refused: {error}", min(pause_seconds, _backoff(misses))
            misses += 1
        if line != printed:
            print(f"dispatcher: {line}", flush=True)
            printed = line
        if not stages.over:
            time.sleep(pause)
    _write_table(plan, stages.states)


def _backoff(misses: int) -> float:
    """Seconds before the next try, after so many in a row without success."""
    return min(_FIRST_BACKOFF_SECONDS * 2 ** min(misses, 10), _LONGEST_BACKOFF_SECONDS)


def _write_table(plan: dict[str, Any], states: dict[str, str]) -> None:
    """Write ``results.md`` and ``results.json`` to the bucket. Raises a ``UserError`` where a stage is not complete."""
    failed = {name: state for name, state in states.items() if state != "Complete"}
    found = {}
    for stage in plan["stages"]:
        if "result" in stage and stage["name"] not in failed:
            if content := bucket.read(stage["result"]):
                found[stage["name"]] = json.loads(content)
            else:
                failed[stage["name"]] = f"Failed: {stage['result']} is missing"
    for name, content in suite.result_files(found, failed).items():
        bucket.write(f"{plan['results'].rstrip('/')}/{name}", content)
    print(suite.table(found, failed), end="", flush=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(states)} stages failed: {', '.join(failed)}. See {plan['results']}/results.md, fix it, and "
            f"give: personmae resume {plan['suite']}"
        )


class Stages:
    """The stages of a plan in a cluster.

    ``states`` has a line for each: 'Complete', 'Failed: WHY', 'runs', or what it waits for. The config map remembers 'runs'
    and what comes after it, so a Job that is missing was deleted if and only if 'runs' is remembered.
    """

    def __init__(self, plan: dict[str, Any], cluster: Cluster, patience_seconds: float) -> None:
        self._plan, self._cluster, self._patience = plan, cluster, patience_seconds
        self._memory = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{plan['suite']}-state"}}
        self._remembered: dict[str, str] | None = None
        self._refused_since: dict[str, float] = {}
        self.states: dict[str, str] = {}

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return len(self.states) == len(self._plan["stages"]) and all(map(suite.is_over, self.states.values()))

    def turn(self) -> None:
        """Look at all stages once, in order, and create those whose time has come.

        Raises:
            Away: the cluster does not answer.
            Refused: it does not say how things are. What it refuses of one stage is that stage's state.
        """
        known = self._recall()
        for stage in self._plan["stages"]:
            name = stage["name"]
            state = known.get(name, "")
            if not suite.is_over(state):
                state = self._look(stage, state)
            self.states[name] = state
            if (suite.is_over(state) and not self._follows_a_failure(stage)) and known.get(name) != state:
                self._remember(name, state)
        self._refused_since.pop("", None)

    def gives_up(self, error: OSError) -> bool:
        """Whether the cluster has refused to say how things are for so long that it will not pass."""
        return isinstance(error, Refused) and error.final and not self._may_pass("")

    def given_up(self, error: OSError) -> dict[str, str]:
        """The states of all stages when the cluster says no more."""
        known = self._remembered or {}
        states = {stage["name"]: known.get(stage["name"], "") for stage in self._plan["stages"]}
        return {name: state if suite.is_over(state) else f"Failed: not known, {error}" for name, state in states.items()}

    def _look(self, stage: Stage, known: str) -> str:
        """The state of a stage that is not over as far as is remembered."""
        job = _job_of(stage)
        live = self._cluster.get(job)
        if live is None:
            return _deleted(stage) if known else self._begin(stage)
        if end := finished(live):
            return end
        if live["metadata"].get("deletionTimestamp"):
            return _deleted(stage) if known else f"waits until an older {stage['job']} is gone"
        if not known:  # the last pod ended between the creation and the note of it
            self._remember(stage["name"], "runs")
        if _INCOMPLETE in live["metadata"].get("annotations", {}):
            return self._guarded(stage, lambda: self._complete(stage, live))
        return "runs"

    def _begin(self, stage: Stage) -> str:
        """Create a stage whose encoder is there."""
        before = self.states[stage["after"]] if stage["after"] else "Complete"
        if before.startswith("Failed"):
            return f"Failed: {stage['after']} has failed"
        if before != "Complete":
            return f"waits for {stage['after']}"
        return self._guarded(stage, lambda: self._create(stage))

    def _follows_a_failure(self, stage: Stage) -> bool:
        """Whether it fails because of another stage: it has not begun, and begins when that one is mended."""
        return self.states[stage["name"]] == f"Failed: {stage['after']} has failed"

    def _create(self, stage: Stage) -> None:
        job = _job_of(stage)
        annotations = job["metadata"].get("annotations", {}) | {_INCOMPLETE: "its other objects are being created"}
        begun = job | {"metadata": job["metadata"] | {"annotations": annotations}, "spec": job["spec"] | {"suspend": True}}
        if live := self._cluster.create(begun):  # or it is there already, and the next turn sees how it is
            self._remember(stage["name"], "runs")
            self._complete(stage, live)

    def _complete(self, stage: Stage, live: Object) -> None:
        """Create what a stage's Job needs, owned by it, and let it go."""
        owner = {key: live[key] for key in ("apiVersion", "kind")} | {key: live["metadata"][key] for key in ("name", "uid")}
        for item in stage["objects"]:
            if item["kind"] != "Job":
                self._create_owned(item, owner | {"blockOwnerDeletion": False})
        change: Object = {"metadata": {"annotations": {_INCOMPLETE: None}}}
        if not _job_of(stage)["spec"].get("suspend"):  # or Kueue lets it go, and may have done so
            change["spec"] = {"suspend": False}
        self._cluster.patch(live, change)

    def _create_owned(self, item: Object, owner: Object) -> None:
        new = item | {"metadata": item["metadata"] | {"ownerReferences": [owner]}}
        if self._cluster.create(new) is not None:
            return
        there = self._cluster.get(item)
        owners = there["metadata"].get("ownerReferences", []) if there else []
        if not any(each["uid"] == owner["uid"] for each in owners):
            what = f"{item['kind']} {item['metadata']['name']}"
            raise Refused(
                f"creating {what}", 409, f"one of an earlier run is still there: wait until {what} is gone, or delete it"
            )

    def _guarded(self, stage: Stage, act: Any) -> str:
        """Do a stage's work; what the cluster refuses of it is this stage's own."""
        name = stage["name"]
        try:
            act()
        except Refused as error:
            if not error.final:
                self._refused_since.pop(name, None)
                return f"waits: {error}"
            return f"waits, for it may pass: {error}" if self._may_pass(name) else f"Failed: {error}"
        self._refused_since.pop(name, None)
        return "runs"

    def _may_pass(self, name: str) -> bool:
        """Whether a refusal has not lasted for longer than servers take to come back."""
        now = time.monotonic()
        return now - self._refused_since.setdefault(name, now) < self._patience

    def _recall(self) -> dict[str, str]:
        """What is remembered of each stage."""
        if self._remembered is None:
            found = self._cluster.get(self._memory)
            if found is None:
                what = f"reading {self._memory['metadata']['name']}"
                raise Refused(what, 404, "the config map with what has become of the stages does not exist")
            data = found.get("data") or {}
            self._remembered = {key.removeprefix("stage."): text for key, text in data.items() if key.startswith("stage.")}
        return self._remembered

    def _remember(self, name: str, state: str) -> None:
        self._cluster.patch(self._memory, {"data": {f"stage.{name}": state}})
        self._recall()[name] = state


def _deleted(stage: Stage) -> str:
    return f"Failed: its Job {stage['job']} {suite.DELETED}"


def _job_of(stage: Stage) -> Object:
    return next(item for item in stage["objects"] if item["kind"] == "Job")


if __name__ == "__main__":
    sys.exit(main())
