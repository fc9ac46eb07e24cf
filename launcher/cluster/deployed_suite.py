"""A suite in a cluster: its stages and how they are, its deletion, and how one that has ended goes on."""

import json
from typing import Any

from launcher.cluster import deployed, names, objects
from launcher.cluster.kubectl import Kubectl
from launcher.cluster.kustomization import Object
from launcher.cluster.objects import INSTANCE, OURS, finished
from launcher.cluster.suite import DELETED, PLAN_VERSION, is_over
from personmae.errors import UserError


def _data(kubectl: Kubectl, name: str) -> dict[str, str]:
    return (kubectl.get("configmap", name) or {}).get("data", {})


def _plan(kubectl: Kubectl, suite: str) -> dict[str, Any]:
    """The plan of a suite's dispatcher, without stages for any other run."""
    return json.loads(_data(kubectl, f"{suite}-config").get("plan.json", '{"stages": []}'))


def _run_of(stage: dict[str, Any]) -> str:
    return stage["job"].removesuffix("-trainer")


def stages(kubectl: Kubectl, suite: str) -> list[str]:
    """The runs of a suite, from its dispatcher's plan. There are none of any other run."""
    return [_run_of(stage) for stage in _plan(kubectl, suite)["stages"]]


def states(kubectl: Kubectl, suite: str) -> dict[str, str]:
    """How each run of a suite is: 'Complete', 'Failed' with the reason, 'at work', or 'waits' where it has not begun."""
    plan = _plan(kubectl, suite)["stages"]
    if not plan:
        return {}
    remembered = _remembered(kubectl, suite)
    jobs = {job["metadata"]["labels"].get(INSTANCE): job for job in kubectl.items("jobs.batch", "-l", OURS)}
    return {_run_of(stage): _state(jobs.get(_run_of(stage)), remembered.get(stage.get("name"), "")) for stage in plan}


def _state(job: Object | None, remembered: str) -> str:
    if job and (end := finished(job)):
        return end
    if is_over(remembered):
        return remembered
    return "at work" if job else "waits"


def _remembered(kubectl: Kubectl, suite: str) -> dict[str, str]:
    """What the dispatcher has noted of its stages, by their short names."""
    data = _data(kubectl, f"{suite}-state")
    return {key.removeprefix("stage."): text for key, text in data.items() if key.startswith("stage.")}


def delete(kubectl: Kubectl, suite: str) -> tuple[list[str], list[str]]:
    """Delete a run, and of a suite all stages too, whatever is left of it: the plan, or objects with the suite's label.

    Returns what is deleted, and what bears its name and stays because it is not ours.
    """
    of_stages = dict.fromkeys([*stages(kubectl, suite), *objects.runs_of_suite(kubectl, suite)])
    done = [objects.delete(kubectl, run) for run in [*of_stages, suite]]
    if of_stages:  # the dispatcher may have been in the middle of one, and has lost its rights by now
        done += [objects.delete(kubectl, run) for run in objects.runs_of_suite(kubectl, suite)]
    return [path for deleted, _ in done for path in deleted], [path for _, others in done for path in others]


def has_ended(kubectl: Kubectl, suite: str) -> bool:
    """Whether this is a suite whose dispatcher is over or gone, so that it can go on."""
    if not _data(kubectl, f"{suite}-config").get("job.json"):
        return False
    job = kubectl.get("jobs.batch", f"{suite}-trainer")
    return job is None or bool(finished(job))


def go_on(kubectl: Kubectl, suite: str) -> list[str]:
    """Have a suite that has ended go on: what is complete stays, and what has failed is tried again from its checkpoint.

    A stage that was deleted by hand stays deleted. When this is interrupted, the same command goes on there. Returns a line
    for each stage that is tried again or stays deleted.

    Raises:
        UserError: the suite is from another version.
    """
    plan = _plan(kubectl, suite)
    if plan.get("version") != PLAN_VERSION:
        raise UserError(f"{suite} was submitted by another version: delete it and submit it again, it goes on from its results")
    found, lines = states(kubectl, suite), []
    for stage in plan["stages"]:
        state = found[_run_of(stage)]
        if state.endswith(DELETED):
            lines.append(f"{_run_of(stage)} was deleted, and stays so")
        elif state.startswith("Failed"):
            _forget(kubectl, suite, stage)
            lines.append(f"{_run_of(stage)} is tried again. It was {state}")
    _replace_dispatcher(kubectl, suite)
    return lines


def _forget(kubectl: Kubectl, suite: str, stage: dict[str, Any]) -> None:
    """Have the dispatcher create a failed stage again: once nothing of it is left, so that it takes nothing old for its own."""
    run = _run_of(stage)
    objects.delete(kubectl, run)
    names.require_free(kubectl, [run], stage["objects"])
    _patch(kubectl, "configmap", f"{suite}-state", {"data": {f"stage.{stage['name']}": None}})


def _replace_dispatcher(kubectl: Kubectl, suite: str) -> None:
    """A new Job for the old one, which cannot start again. What the old one owns is kept for the new one."""
    job: Object = json.loads(_data(kubectl, f"{suite}-config")["job.json"])
    resource, name = objects.WORKLOADS["Job"][0], job["metadata"]["name"]
    owned = [item for item in objects.of_run(kubectl, suite)[0] if item["kind"] != "Job"]
    if kubectl.get(resource, name):
        for item in owned:
            _patch(kubectl, objects.resource_of(item), item["metadata"]["name"], {"metadata": {"ownerReferences": None}})
        kubectl.run("delete", f"job.batch/{name}", "--ignore-not-found", "--cascade=foreground", "--wait=false")
        names.require_free(kubectl, [suite], [job])
    deployed.apply(kubectl, [job])
    deployed.own(kubectl, kubectl.get(resource, name), owned)


def _patch(kubectl: Kubectl, resource: str, name: str, change: Object) -> None:
    kubectl.run("patch", resource, name, "--type", "merge", "-p", json.dumps(change))
