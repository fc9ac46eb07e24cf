"""What the commands of ``cli.py`` do."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from launcher.cluster import bucket, deployed, deployed_suite, logs, render, status, suite
from launcher.cluster.kubectl import Kubectl
from launcher.cluster.objects import finished, upload_to
from launcher.cluster.render import Rendered
from launcher.cluster.request import Request, check_name, check_namespace, environment_of, require_role
from personmae import config
from personmae.errors import EXIT_FAILED, UserError
from personmae.system import files, storage

EXIT_TIMEOUT = 3  # of --wait
WATCH_SECONDS = 10
_PAUSE_SECONDS = 10
_ENDPOINTS = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_EXAMPLE = "registry.example.com/"
_MISSES = 6  # of --wait: requests in a row without an answer


def request_of(args: argparse.Namespace) -> Request:
    """What the command line asks for."""
    names = ("config", "overrides", "overlay", "nodes", "gpus", "cpu", "memory", "image", "name", "namespace", "role", "env")
    request = Request(**{name: getattr(args, name) for name in names}, components=args.components or ())
    return replace(request, overrides=[*args.overrides, *args.set])


def _warn(runs: list[Rendered]) -> None:
    for line in dict.fromkeys(line for rendered in runs for line in rendered.warnings):
        print(f"warning: {line}", file=sys.stderr)


def render_run(args: argparse.Namespace) -> None:
    """``personmae render``."""
    runs, created = _runs(request_of(args))
    everything = [item for rendered in created for item in rendered.objects]
    _warn(runs)
    if args.write and len(runs) > 1:
        raise UserError("--write is for one run; a suite's objects are printed: leave it out")
    if args.write:
        render.write(runs[0], args.write)
        print(f"{args.write}: kubectl apply -k {args.write} && personmae adopt {runs[0].run}{_where(args)}")
    elif args.output == "json":
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": everything}, indent=1))
    else:
        print(render.to_yaml(everything), end="")


def _runs(request: Request) -> tuple[list[Rendered], list[Rendered]]:
    """The run of a configuration, or a suite's dispatcher and runs; and those of them that are to be created now."""
    if not suite.is_suite(request.config):
        rendered = render.render(request)
        return [rendered], [rendered]
    dispatcher, runs = suite.render_suite(request)
    return [dispatcher, *runs], suite.first_runs(dispatcher, runs)


def submit_run(args: argparse.Namespace) -> None:
    """``personmae submit``."""
    if args.local:
        if args.config.is_file() and not suite.is_suite(args.config):
            raise UserError(f"--local is for a suite, a file with 'stages'; {args.config} has none: give it to its own verb")
        suite.run_local(args.config, [*args.overrides, *args.set])
        return
    request = request_of(args)
    require_role(request)
    runs, created = _runs(request)
    everything = [item for rendered in runs for item in rendered.objects]  # what a dispatcher will create is tried too
    _warn(runs)
    _require_image(request, runs)
    if not args.no_bucket_check:
        with _endpoint_of_pods(environment_of(request)):
            check_places(runs)
    name = runs[0].run
    if args.dry_run == "client":
        print(f"{name}: {len(everything)} objects; nothing was asked of a cluster and nothing created")
        return
    kubectl = Kubectl(args.namespace, args.context)
    untried = deployed.preflight(kubectl, [r.run for r in runs], everything)
    if args.dry_run == "server":
        for line in untried:
            print(f"warning: {line}", file=sys.stderr)
        print(f"{name}: the cluster would take all {len(everything) - len(untried)} objects; nothing was created")
        return
    since, *_ = [deployed.create(kubectl, [r.run for r in runs], each.objects, each.workload) for each in created]
    try:
        for line in deployed.watch(kubectl, [r.run for r in runs], since, WATCH_SECONDS):
            print(f"warning: {line}", file=sys.stderr)
    except KeyboardInterrupt:
        print(next_commands(name, args), flush=True)  # it goes on without us
        raise
    failed = _failures(kubectl, [r.run for r in runs])
    for run, why in failed.items():
        more = f"see: personmae logs {run}{_where(args)}"
        print(f"error: {run} is submitted and has ended already: {why}; {more}", file=sys.stderr)
    if failed:
        sys.exit(EXIT_FAILED)
    print(next_commands(name, args), flush=True)
    if args.wait is not None:
        sys.exit(_wait(kubectl, name, args.wait))


def _failures(kubectl: Kubectl, runs: list[str]) -> dict[str, str]:
    """The runs that have failed by now; none where the cluster does not answer, which has been warned of."""
    try:
        return deployed.failures(kubectl, runs)
    except UserError:
        return {}


def _require_image(request: Request, runs: list[Rendered]) -> None:
    """Raise a ``UserError`` where the image is left to the overlay, which has an example's; one that is given is taken."""
    images = {image.get("newName", "") for rendered in runs for image in rendered.kustomization["images"]}
    if not any(name.startswith(_EXAMPLE) for name in images):
        return
    if not request.image:
        raise UserError("an image is required: build the Dockerfile, push it and give --image NAME@sha256:...")
    print(
        f"warning: {request.image} is at {_EXAMPLE}, a name for examples that no name server knows: nodes can only pull it "
        "where they are told of such a registry",
        file=sys.stderr,
    )


@contextmanager
def _endpoint_of_pods(given: dict[str, str]) -> Iterator[None]:
    """For a while the S3 endpoint that ``--env`` gives to the pods; without one, this machine's."""
    before = dict(os.environ)
    found = {name: value for name, value in given.items() if name in (*_ENDPOINTS, "AWS_DEFAULT_REGION")}
    if any(name in found for name in _ENDPOINTS):
        for name in _ENDPOINTS:
            os.environ.pop(name, None)
    os.environ.update(found)
    storage.renew_credentials()  # a client keeps its endpoint
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        storage.renew_credentials()


def check_places(runs: list[Rendered]) -> None:
    """Raise a ``UserError`` unless the data and the buckets that runs name are there; others than ``s3://`` are a warning."""
    own = {getattr(rendered.settings, "checkpoint").upload_to for rendered in runs if hasattr(rendered.settings, "checkpoint")}  # noqa: B009
    checks: dict[str, Callable[[str], None]] = {}
    for rendered in runs:
        settings: Any = rendered.settings
        if isinstance(settings, suite.Suite):
            checks[settings.results] = bucket.require_bucket
            continue
        checks[settings.checkpoint.upload_to] = bucket.require_bucket
        if isinstance(settings, config.Pretrain):
            checks[settings.data.shards] = bucket.require_shards
        else:
            checks[settings.root] = bucket.require_something
            if settings.init != "random" and settings.init not in own:  # another stage's is still to come
                checks[settings.init] = bucket.require_something
    for place, require in checks.items():
        if place.startswith("s3://"):
            _check_place(place, require)
        else:
            print(f"warning: whether {place} is there is not checked: only s3:// is", file=sys.stderr)


def _check_place(place: str, require: Callable[[str], None]) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        require(place)
    except UserError:
        raise
    except (BotoCoreError, ClientError) as error:
        raise UserError(
            f"looking at {place} failed: {error}; fix it, or give --no-bucket-check where only the pods reach it"
        ) from error


def next_commands(run: str, args: argparse.Namespace) -> str:
    """What to do next, to be copied."""
    commands = ("status", "logs -f", "suspend", "delete")
    return "\n".join([f"{run} is submitted; next:", *(f"  personmae {command} {run}{_where(args)}" for command in commands)])


def _where(args: argparse.Namespace) -> str:
    return f" -n {args.namespace}" + (f" --context {args.context}" if args.context else "")


def _wait(kubectl: Kubectl, run: str, seconds: float) -> int:
    deadline, misses = time.monotonic() + seconds, 0
    while True:
        try:
            end, misses = finished(deployed.find(kubectl, run)[1]), 0
        except UserError:
            end, misses = None, misses + 1
            if misses == _MISSES:
                raise
        if end:
            break
        if time.monotonic() >= deadline:
            print(f"{run} is not over after {seconds:g} s; it goes on", file=sys.stderr)
            return EXIT_TIMEOUT
        time.sleep(_PAUSE_SECONDS)
    print(f"{run}: {end}")
    return 0 if end == "Complete" else EXIT_FAILED


def show_status(args: argparse.Namespace) -> None:
    """``personmae status``."""
    kubectl = _kubectl(args)
    while True:
        state = status.read(kubectl, args.run_name)
        print(files.to_json(state, indent=1) if args.output == "json" else status.to_text(state), flush=True)
        if not args.watch or state["state"].startswith(("Complete", "Failed")):
            return
        time.sleep(_PAUSE_SECONDS)


def _kubectl(args: argparse.Namespace) -> Kubectl:
    """For the commands that name a run: a name that kubectl would take for an option or a list does not reach it."""
    check_name(args.run_name)
    check_namespace(args.namespace)
    return Kubectl(args.namespace, args.context)


def show_logs(args: argparse.Namespace) -> None:
    """``personmae logs``."""
    logs.show(_kubectl(args), args.run_name, index=args.index, since=args.since, follow=args.follow)


def scale_run(args: argparse.Namespace) -> None:
    """``personmae scale``."""
    deployed.scale(_kubectl(args), args.run_name, args.nodes)
    print(f"{args.run_name}: {args.nodes} nodes; the ranks save and go on with those that there are")


def suspend_run(args: argparse.Namespace) -> None:
    """``personmae suspend``."""
    for run in _suspend(args, True):
        print(f"{run} is suspended; its ranks save first")


def resume_run(args: argparse.Namespace) -> None:
    """``personmae resume``."""
    kubectl = _kubectl(args)
    if deployed_suite.has_ended(kubectl, args.run_name):
        for line in deployed_suite.go_on(kubectl, args.run_name):
            print(line)
        print(f"{args.run_name} goes on; what is complete stays")
        return
    for run in _suspend(args, False):
        print(f"{run} is resumed")


def _suspend(args: argparse.Namespace, suspended: bool) -> list[str]:
    """Suspend or resume a run, or a suite's dispatcher and those of its stages that have begun and are not over."""
    kubectl = _kubectl(args)
    states = deployed_suite.states(kubectl, args.run_name)
    runs = [*(run for run, state in states.items() if state == "at work"), args.run_name]
    for run in runs:
        deployed.set_suspended(kubectl, run, suspended)
    return runs


def adopt_run(args: argparse.Namespace) -> None:
    """``personmae adopt``."""
    adopted = deployed.adopt(_kubectl(args), args.run_name)
    print(f"{args.run_name}: {', '.join(adopted) or 'nothing more'} goes with it now")


def delete_run(args: argparse.Namespace) -> None:
    """``personmae delete``."""
    kubectl = _kubectl(args)
    try:
        _, found = deployed.find(kubectl, args.run_name)
    except UserError as error:
        deleted, others = deployed_suite.delete(kubectl, args.run_name)  # what a creation may have left that failed half way
        if not deleted:
            raise UserError(f"{error}{_others(others)}") from None
        print(f"what there was of {args.run_name} is deleted{_others(others)}")
        return
    if deployed_suite.stages(kubectl, args.run_name) and not deployed.is_over(found):
        deployed.set_suspended(kubectl, args.run_name, True)  # or its dispatcher would find its stages gone, and write that
    _, others = deployed_suite.delete(kubectl, args.run_name)
    place = upload_to(found)
    kept = f"; its checkpoints stay at {place}" if place else ""
    print(f"{args.run_name} is deleted{kept}{_others(others)}")


def _others(paths: list[str]) -> str:
    """What bears a run's name and is somebody else's."""
    return f"; not of personmae, so it stays: {', '.join(paths)}" if paths else ""
