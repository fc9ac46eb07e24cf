"""The split of real people by identity that benchmarks/real_people.py makes, on names alone."""

import importlib
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from personmae.errors import UserError

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))  # which is no package
real_people = importlib.import_module("real_people")

NAMES = [
    *(f"{pid:04d}_c{camera}s1_{frame:06d}_01.jpg" for pid in range(2, 11) for camera in (1, 3, 4) for frame in (1, 2, 30)),
    "-1_c1s1_000001_00.jpg",
    "0000_c1s1_000001_00.jpg",
]


def pids(names: list[str]) -> set[str]:
    return {name.split("_")[0] for name in names}


def test_each_identity_is_in_one_half_and_each_camera_gives_one_query():
    split = real_people.split_by_identity(NAMES)
    train, query, gallery = (split[part] for part in ("bounding_box_train", "query", "bounding_box_test"))
    assert (len(pids(train)), len(pids(query))) == (5, 4)
    assert pids(query) == pids(gallery)
    assert not pids(train) & pids(query)
    assert sorted([*train, *query, *gallery]) == sorted(set(NAMES) - {NAMES[-1], NAMES[-2]})
    assert set(Counter(name[:7] for name in query).values()) == {1}  # PPPP_cC
    assert len(query) == 4 * 3
    assert all(name.endswith("_000001_01.jpg") for name in query)  # the first of its camera


def test_the_split_is_of_the_names_and_the_seed_alone():
    assert real_people.split_by_identity(NAMES[::-1]) == real_people.split_by_identity(NAMES)
    halves = {tuple(sorted(pids(real_people.split_by_identity(NAMES, seed)["query"]))) for seed in range(5)}
    assert len(halves) > 1


def test_images_are_linked_and_another_split_is_never_mixed_in(tmp_path):
    (tmp_path / "crops").mkdir()
    for name in NAMES:
        (tmp_path / "crops" / name).write_text(name)
    counts = real_people.write_split(tmp_path / "crops", tmp_path / "split")
    assert counts == {"bounding_box_train": 45, "query": 12, "bounding_box_test": 24}
    assert counts == real_people.write_split(tmp_path / "crops", tmp_path / "split")
    for part in counts:
        for name in os.listdir(tmp_path / "split" / part):
            assert os.path.samefile(tmp_path / "split" / part / name, tmp_path / "crops" / name)
    (tmp_path / "split" / "query" / "0099_c1s1_000001_01.jpg").touch()
    with pytest.raises(UserError, match="query holds other images"):
        real_people.write_split(tmp_path / "crops", tmp_path / "split")


@pytest.mark.parametrize(
    ("names", "output"), [(["a.jpg"], "named as in Market-1501 are required"), (NAMES[:9], "two identities or more")]
)
def test_what_cannot_be_split_is_told(names, output):
    with pytest.raises(UserError, match=output):
        real_people.split_by_identity(names)


def test_means_are_over_seeds():
    measured = [{"rows": {"mAP": mAP, "rank1": 1.0}, "pixel_loss": loss} for mAP, loss in ((10.0, 0.5), (20.0, 0.7))]
    starts = {"personmae": {f"seed {i}": found for i, found in enumerate(measured)}}
    found = real_people.means({"starts": starts, "without labels": {}})
    assert found["personmae"]["rows"] == {"mean": 15.0, "min": 10.0, "max": 20.0, "seeds": 2}
    assert found["personmae"]["pixel_loss"]["mean"] == 0.6
