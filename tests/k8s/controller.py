"""Stands in for the Job controller: makes the pods of an Indexed Job and judges their ends by what its manifest says.

It follows the documentation of Kubernetes 1.34 and what was seen of a real controller; a field that it does not know is an
error, so that no manifest is rehearsed with less than it says.
"""

import time
from collections.abc import Callable
from typing import Any

from kubelet import Object, Pod

_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 10.0, 600.0
_KNOWN = {
    "completionMode",
    "parallelism",
    "completions",
    "backoffLimitPerIndex",
    "maxFailedIndexes",
    "podReplacementPolicy",
    "successPolicy",
    "podFailurePolicy",
    "suspend",
    "ttlSecondsAfterFinished",
    "template",
}


class JobController:
    """One Job. ``turn`` is called again and again; ``job`` is the live object, which others patch."""

    def __init__(self, job: Object, create: Callable[[int, dict[str, str]], Pod], factor: float) -> None:
        spec = job["spec"]
        assert set(spec) <= _KNOWN, f"the stand-in does not know {sorted(set(spec) - _KNOWN)} of a Job"
        assert spec["completionMode"] == "Indexed"
        assert "backoffLimitPerIndex" in spec, "the stand-in knows no other limit"
        self.job, self._create, self._factor = job, create, factor
        self.pods: list[Pod] = []  # of all times
        self._judged: set[str] = set()
        self._let_go: set[str] = set()  # deleted by the controller itself, for a suspension or a smaller size
        self._succeeded: set[int] = set()
        self._failed_indexes: set[int] = set()
        self._counted: dict[int, int] = {}  # failures by index
        self._ignored: dict[int, int] = {}
        self._not_before: dict[int, float] = {}
        self._failed = 0
        self._ending: dict[str, Any] | None = None  # the condition that the Job will have once its pods are gone

    @property
    def finished(self) -> bool:
        return any(c["type"] in ("Complete", "Failed") for c in self.job["status"].get("conditions", []))

    def turn(self) -> None:
        """Look at the pods and do what follows."""
        if self.finished:
            return
        for pod in self.pods:
            if pod.ended and pod.name not in self._judged:
                self._judged.add(pod.name)
                self._judge(pod)
        self._decide()
        live = [pod for pod in self.pods if not pod.ended]
        halted = bool(self.job["spec"].get("suspend")) or "deletionTimestamp" in self.job["metadata"]
        for pod in live:
            if halted or pod.index >= self.job["spec"]["completions"]:
                self._let_go.add(pod.name)
            if self._ending or pod.name in self._let_go:
                pod.delete()
        if not self._ending and not halted:
            self._replace(live)
        self._tell([pod for pod in self.pods if not pod.ended])

    def _judge(self, pod: Pod) -> None:
        """Account for a pod that has ended: one that was let go counts neither way, for its index has no back-off then."""
        ours = pod.index < self.job["spec"]["completions"] and pod.name not in self._let_go
        if pod.phase == "Succeeded":
            self._succeeded |= {pod.index} if ours else set()
            return
        action, why = self._match(pod)
        if action == "FailJob" and not self._ending:
            self._end("Failed", "PodFailurePolicy", why)
        if not ours:
            return
        count = self._ignored if action == "Ignore" else self._counted
        count[pod.index] = count.get(pod.index, 0) + 1
        self._failed += action != "Ignore"
        if action == "FailIndex" or self._counted.get(pod.index, 0) > self.job["spec"]["backoffLimitPerIndex"]:
            self._failed_indexes.add(pod.index)
        number = self._counted.get(pod.index, 0) + self._ignored.get(pod.index, 0)
        pause = min(_FIRST_BACKOFF_SECONDS * 2 ** (number - 1), _LONGEST_BACKOFF_SECONDS)
        self._not_before[pod.index] = time.monotonic() + pause * self._factor

    def _match(self, pod: Pod) -> tuple[str, str]:
        """Action of the first rule that a failed pod meets, and the words for it."""
        where = f"pod {pod.metadata['namespace']}/{pod.name}"
        for number, rule in enumerate(self.job["spec"].get("podFailurePolicy", {}).get("rules", [])):
            told = f"matching {rule['action']} rule at index {number}"
            for pattern in rule.get("onPodConditions", []):
                if pattern["type"] in pod.conditions and pattern.get("status", "True") == "True":
                    return rule["action"], f"{where[0].upper()}{where[1:]} has condition {pattern['type']} {told}"
            wanted = rule.get("onExitCodes")
            for name, code in pod.codes().items() if wanted else ():
                named = wanted.get("containerName", name) == name
                if code and named and (code in wanted["values"]) == (wanted["operator"] == "In"):
                    return rule["action"], f"Container {name} for {where} failed with exit code {code} {told}"
        return "Count", ""

    def _decide(self) -> None:
        """Whether the Job is over."""
        spec = self.job["spec"]
        if self._ending:
            return None
        for number, rule in enumerate(spec.get("successPolicy", {}).get("rules", [])):
            assert set(rule) == {"succeededCount"}
            if len(self._succeeded) >= rule["succeededCount"]:
                return self._end("Complete", "SuccessPolicy", f"Matched rules at index {number}")
        if len(self._failed_indexes) > spec.get("maxFailedIndexes", float("inf")):
            told = "Job has exceeded the specified maximal number of failed indexes"
            return self._end("Failed", "MaxFailedIndexesExceeded", told)
        if len(self._succeeded | self._failed_indexes) == spec["completions"]:
            if self._failed_indexes:
                return self._end("Failed", "FailedIndexes", "Job has failed indexes")
            return self._end("Complete", "CompletionsReached", "Reached expected number of succeeded pods")
        return None

    def _end(self, kind: str, reason: str, message: str) -> None:
        """Decide how the Job ends: its pods go first."""
        self._ending = {"type": kind, "status": "True", "reason": reason, "message": message}
        early = "SuccessCriteriaMet" if kind == "Complete" else "FailureTarget"
        self.job["status"].setdefault("conditions", []).append(self._ending | {"type": early})

    def _replace(self, live: list[Pod]) -> None:
        """Make the pods that are missing, lowest index first, as soon as the old ones are gone for good, or going."""
        spec = self.job["spec"]
        patient = spec.get("podReplacementPolicy", "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed")
        there = [pod for pod in live if patient == "Failed" or not pod.deleted]
        taken = {pod.index for pod in there} | self._succeeded | self._failed_indexes
        for index in range(spec["completions"]):
            if len(there) < spec["parallelism"] and index not in taken and time.monotonic() > self._not_before.get(index, 0):
                failures = {"batch.kubernetes.io/job-index-failure-count": str(self._counted.get(index, 0))}
                if ignored := self._ignored.get(index):
                    failures["batch.kubernetes.io/job-index-ignored-failure-count"] = str(ignored)
                there.append(self._create(index, failures))
                self.pods.append(there[-1])

    def _tell(self, live: list[Pod]) -> None:
        status = self.job["status"]
        status["terminating"] = sum(bool(pod.deleted) for pod in live)
        status["active"] = len(live) - status["terminating"]
        status["ready"] = sum(pod.ready for pod in live)
        status["failed"], status["succeeded"] = self._failed, len(self._succeeded)
        status["completedIndexes"] = ",".join(map(str, sorted(self._succeeded)))
        status["failedIndexes"] = ",".join(map(str, sorted(self._failed_indexes)))
        if self._ending and not live:
            status["conditions"].append(self._ending)
