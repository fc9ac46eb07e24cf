"""Every overlay with each component, each two and all that it may have: built, validated strictly, nothing of a component lost.

Components change an object in ways that can hide each other's. Two show every such pair, and the largest sets show that more
than two go together; the 30,000 sets between say no more.
"""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemas
import yaml
from sample_requests import EXCLUSIVE, admissible, by_name, largest_sets, request_for, small_sets

from launcher.cluster import kustomization, render, request
from launcher.cluster.request import K8S, Request
from personmae.errors import UserError

SMALL, LARGEST = list(small_sets()), list(largest_sets())
Objects = list[dict[str, Any]]


def combinations(overlay: str) -> list[tuple[str, ...]]:
    """The small sets that an overlay may have, and the largest without what it may not."""
    largest = [tuple(name for name in names if admissible(overlay, (name,))) for names in LARGEST]
    return list(dict.fromkeys([*(names for names in SMALL if admissible(overlay, names)), *largest]))


def build(overlay: str, names: tuple[str, ...]) -> Objects:
    """An overlay with components, called run so that overlays which differ in their data alone give equal Jobs."""
    directory = K8S / "overlays" / overlay
    spec = kustomization.read(directory)
    spec["components"] = [*spec.get("components", []), *request.components_of(Request(Path(), components=names), spec)]
    spec["namePrefix"] = "run-"
    for labels in spec["labels"]:
        labels["pairs"] = dict.fromkeys(labels["pairs"], "run")
    return kustomization.build(directory, spec)


@functools.cache
def check(text: str) -> None:
    """An object as JSON, for every version; each is checked once, in however many combinations it stands."""
    item = json.loads(text)
    if not schemas.is_custom(item):
        for version in schemas.VERSIONS:
            schemas.check_core_quickly(item, version)
    elif schemas.have_custom():
        schemas.check_custom(item)


@functools.cache
def wanted(name: str) -> list[tuple[dict[str, str], str, Any]]:
    """Target, path and value of everything that a component's patches set, in order."""
    patches = kustomization.read(K8S / "components" / name).get("patches", [])
    operations = [(patch["target"], each) for patch in patches for each in yaml.safe_load(patch["patch"])]
    return [(target, each["path"], each["value"]) for target, each in operations if each["op"] != "test"]


@functools.cache
def lost(text: str, name: str) -> list[str]:
    """Paths at which an object does not have what a component sets there."""
    item, missing = json.loads(text), []
    asked = [(path, value) for target, path, value in wanted(name) if _is_target(item, target)]
    for path, value in dict(asked).items():  # the last one for a path: priority sets a class, then another for benchmarks
        *parents, key = [part.replace("~1", "/") for part in path.strip("/").split("/")]
        parent = functools.reduce(lambda node, part: node[int(part)] if isinstance(node, list) else node[part], parents, item)
        there = value in parent if key == "-" else (parent[int(key)] if isinstance(parent, list) else parent.get(key)) == value
        missing += [] if there else [path]
    return missing


def _is_target(item: dict[str, Any], target: dict[str, str]) -> bool:
    key, _, value = target.get("labelSelector", "").partition("=")
    named = item["metadata"]["name"].endswith(f"-{target['name']}")
    return item["kind"] == target["kind"] and named and (not key or item["metadata"]["labels"].get(key) == value)


@pytest.mark.parametrize("overlay", request.overlays())
def test_every_combination_is_valid_and_loses_nothing_of_its_components(overlay: str) -> None:
    assert len(combinations(overlay)) >= 22
    for names in combinations(overlay):
        assert admissible(overlay, names)
        for item in build(overlay, names):
            text = json.dumps(item, sort_keys=True)
            check(text)
            for name in names:
                assert not lost(text, name), (names, name, lost(text, name))


@pytest.mark.parametrize("overlay", request.overlays())
def test_every_other_combination_is_refused(overlay: str) -> None:
    bad = [names for names in SMALL if not admissible(overlay, names)] + [*EXCLUSIVE]
    for names in bad:
        with pytest.raises(UserError, match=r"the component|takes one of"):
            build(overlay, names)


@pytest.mark.parametrize("overlay", request.overlays())
def test_a_rendered_request_is_valid_with_each_pair_of_components_and_with_the_largest_sets(overlay: str) -> None:
    for names in combinations(overlay):
        chosen = request_for(overlay, components=names, name="with", gpus=4, memory="96Gi", cpu="12")
        for item in render.render(chosen).objects:
            check(json.dumps(item, sort_keys=True))


def test_the_sets_are_all_pairs_and_all_that_cannot_grow() -> None:
    number = len(request.components())
    assert len(SMALL) == len({frozenset(names) for names in SMALL}) == 1 + number + number * (number - 1) // 2 - 3
    assert len(LARGEST) == len({frozenset(names) for names in LARGEST}) == 2**3
    assert {len(names) for names in LARGEST} == {number - 3}
    assert {name for names in LARGEST for name in names} == {*request.components()}


def test_a_lost_setting_is_noticed() -> None:
    job = next(item for item in build("pretrain", ("efa",)) if item["kind"] == "Job")
    del job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["hugepages-2Mi"]
    assert lost(json.dumps(job), "efa") == ["/spec/template/spec/containers/0/resources/limits/hugepages-2Mi"]


SAMPLE = random.Random(0).sample([(o, n) for o in request.overlays() for n in combinations(o)], 24)


@pytest.mark.parametrize(("overlay", "names"), SAMPLE, ids=lambda v: v if isinstance(v, str) else "+".join(v))
def test_kustomize_builds_a_sample_of_the_combinations_as_we_do(
    overlay: str, names: tuple[str, ...], kustomize: Callable[[Path], Any], tmp_path: Path
) -> None:
    rendered = render.render(request_for(overlay, components=names))
    render.write(rendered, tmp_path / "run")
    assert by_name(rendered.objects) == kustomize(tmp_path / "run")
