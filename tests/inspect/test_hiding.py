"""What is told of a run's masks: how often each patch is hidden, and how much of a drawn figure is seen."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from personmae.__main__ import main
from personmae.inspect import hiding
from personmae.model.inputs import Draws, RegionSpec
from personmae.model.regions import RegionDraws
from personmae.synthetic.benchmarks import FORMAT_VERSION
from personmae.synthetic.image import draw_shot, draw_silhouette
from personmae.synthetic.plan import SynthSettings, plan

SPEC = RegionSpec((128, 64), 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)
SETTINGS = SynthSettings(seed=3, pool_images=60, pool_identities=12, occluded_fraction=0.0, cut_fraction=0.0)


def mark_of(settings: SynthSettings, version: int = FORMAT_VERSION) -> bytes:
    return json.dumps({"format_version": version, "settings": asdict(settings), "counts": {}}).encode()


def test_blocks_hide_the_middle_and_masks_that_mind_the_person_all_rows_alike() -> None:
    blocks = hiding.hiding_map(SPEC, seed=0)
    assert blocks.shape == (8, 4)
    assert blocks.mean().item() == pytest.approx(0.75)
    assert blocks[3:5, 1:3].min() > 0.9
    assert blocks[0, 0] < 0.5
    even = hiding.hiding_map(dataclasses.replace(SPEC, mask_kind="person"), seed=0)
    assert (even[:, 1:3] - 0.75).abs().max() < 0.03
    assert torch.equal(blocks, hiding.hiding_map(SPEC, seed=0))


def test_a_map_is_told_by_its_middle_and_its_corners() -> None:
    shares = torch.tensor([[0.1, 0.5, 0.5, 0.3], [0.5, 0.8, 0.6, 0.5], [0.5, 0.9, 0.7, 0.5], [0.2, 0.5, 0.5, 0.2]])
    assert hiding.describe_map(shares).startswith("the middle 75.0 %, a corner 20.0 %, on average 48.")
    odd = torch.zeros(3, 3)
    odd[1, 1] = 1.0
    assert hiding.describe_map(odd).startswith("the middle 100.0 %, a corner 0.0 %")


def whole_image(count: int) -> RegionDraws:
    """The whole canvas, neither flipped nor shifted."""
    boxes, none = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * count), torch.zeros(count, dtype=torch.int64)
    return RegionDraws(boxes, torch.zeros(count, dtype=torch.bool), none, torch.zeros(count, 2, dtype=torch.int64))


def test_what_is_seen_are_the_figures_pixels_in_visible_patches() -> None:
    figure = torch.zeros(2, 128, 64, 3, dtype=torch.uint8)
    figure[0, 16:48, 16:32] = 255  # two patches, one of them visible
    ids = torch.tensor([[5, 0, 31]] * 2).sort(dim=1)[0]  # 5 is the patch at (1, 1)
    spec = dataclasses.replace(SPEC, max_shift=0)
    seen = hiding.share_seen(figure, torch.tensor([[128, 64]] * 2), Draws(whole_image(2), ids), spec)
    assert seen[0].item() == pytest.approx(0.5, abs=1e-3)
    assert seen[1].isnan()


def kinds_seen(settings: SynthSettings, **mask: float | str) -> Tensor:
    spec = dataclasses.replace(SPEC, **mask)  # pyright: ignore[reportArgumentType]
    seen = hiding.seen_of_drawn(spec, 0, mark_of(settings))
    assert seen is not None
    assert len(seen) == 60
    return seen


def test_of_drawn_people_random_masks_show_a_quarter_blocks_less_and_masks_that_mind_the_person_about_as_much() -> None:
    block, random, person = (kinds_seen(SETTINGS, mask_kind=kind).mean().item() for kind in ("block", "random", "person"))
    assert random == pytest.approx(0.25, abs=0.03)
    assert person == pytest.approx(0.25, abs=0.05)
    assert block < 0.2
    assert kinds_seen(SETTINGS, block_ratio=0.0).mean().item() == pytest.approx(random, abs=1e-6)
    assert hiding.describe_seen(torch.tensor([0.25, 0.0, 0.5, 0.25])) == (
        "25.0 % of the figure on average, less than a twentieth of it in 25.0 % of the images"
    )


@pytest.mark.parametrize("mark", [None, b"{}", b"no JSON", b"[1]", b'{"settings": {"seed": -1}}', mark_of(SETTINGS, 99)])
def test_where_people_are_not_drawn_by_this_version_nothing_is_told_of_figures(mark: bytes | None) -> None:
    assert hiding.seen_of_drawn(SPEC, 0, mark) is None


def test_a_silhouette_is_where_an_image_shows_its_person() -> None:
    """Crops fill their boxes, so it is tall and in the middle."""
    shots = [shot for shot in plan(SETTINGS) if shot.split == "pool"][:12]
    for shot in shots:
        image, _ = draw_shot(SETTINGS, shot)
        figure = draw_silhouette(SETTINGS, shot)
        assert figure.shape == image.shape[:2]
        share = (figure > 127).mean()
        assert 0.05 < share < 0.7
        rows, columns = np.flatnonzero((figure > 127).any(axis=1)), np.flatnonzero((figure > 127).any(axis=0))
        assert rows[-1] - rows[0] > 0.6 * figure.shape[0]
        assert abs(columns.mean() - figure.shape[1] / 2) < 0.25 * figure.shape[1]


def test_what_hides_a_person_is_no_part_of_the_silhouette() -> None:
    free, hidden = (
        sum(float((draw_silhouette(SETTINGS, shot._replace(occlusion=occlusion)) > 127).mean()) for shot in plan(SETTINGS)[:10])
        for occlusion in (0.0, 0.65)
    )
    assert hidden < 0.6 * free


def test_a_dry_run_tells_what_is_hidden(shard_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("COLUMNS", "300")
    arguments = ["pretrain", "configs/quickstart.yaml", f"data.shards={shard_dir}", f"run_dir={tmp_path / 'run'}"]
    assert main([*arguments, "train.global_batch_size=8", "mask.kind=random", "--dry-run", "1"]) == 0
    said = capsys.readouterr().out
    output = next(line for line in said.splitlines() if line.startswith("how often a patch of RegionA is hidden"))
    assert output.endswith("on average 75.0 %")
    rows = [line.split() for line in said.splitlines()[said.splitlines().index(output) + 1 :]]
    assert [len(row) for row in rows] == [4] * 8
    assert all(70 <= int(cell) <= 80 for row in rows for cell in row)
    assert not (tmp_path / "run").exists()
