"""Exported files in the trackers that people run: their own classes give our features, and their tracks follow drawn people.

The tools do not go into one environment with ours. ``PERSONMAE_ULTRALYTICS``, ``PERSONMAE_BOXMOT`` and ``PERSONMAE_REID`` name
the Python of one that has ultralytics, boxmot, or roboflow's reid.
"""

import os
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import small_runs
import torch
from small_runs import personmae

import personmae as package
from personmae.weights.export_check import compare

SIZE = tuple(small_runs.MODEL["img_size"])
NUM_PEOPLE, NUM_FRAMES, STEP = 4, 12, 6  # pixels that a person walks from one frame to the next
PROGRAM = Path(__file__).with_name("tracker_programs.py")

pytestmark = pytest.mark.slow


@pytest.fixture(params=["ultralytics", "boxmot", "reid"])
def tool(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A tool, and the Python that has it, by the environment."""
    variable = f"PERSONMAE_{request.param.upper()}"
    if not (python := os.environ.get(variable)):
        pytest.skip(f"{variable} does not name the Python of an environment with {request.param}")
    return request.param, python


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and the folder that was made of it."""
    pytest.importorskip("onnxruntime", reason="personmae[export] is not installed")
    folder = tmp_path_factory.mktemp("trackers")
    run = small_runs.make(folder / "run", "neck")
    result = personmae("export", run, folder / "out", "--formats", "timm,reid,onnx")
    assert result.returncode == 0, result.stderr
    return run, folder / "out"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four drawn people who walk, two to the left and two to the right, as frames and boxes."""
    folder = tmp_path_factory.mktemp("video")
    height, width = SIZE
    people = [cv2.resize(image, (width, height)) for image in small_runs.people(NUM_PEOPLE)]
    background = np.random.default_rng(0).integers(90, 140, (240, 400, 3), dtype=np.uint8)
    boxes = np.empty((NUM_FRAMES, NUM_PEOPLE, 4), np.float32)
    for number in range(NUM_FRAMES):
        frame = background.copy()
        for person, image in enumerate(people):
            x = 60 + STEP * number + 20 * person if person % 2 else 300 - STEP * number - 20 * person
            y = 20 + 50 * person
            frame[y : y + height, x : x + width] = image[..., ::-1]
            boxes[number, person] = x, y, x + width, y + height
        assert cv2.imwrite(str(folder / f"{number + 1:06}.png"), frame)
    np.save(folder / "boxes.npy", boxes)
    return folder


def run_tool(tool: tuple[str, str], exported: Path, video: Path, out: Path) -> dict[str, np.ndarray]:
    """What a tool finds, in a process of its own Python."""
    name, python = tool
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "YOLO_CONFIG_DIR": str(out.parent), "OMP_NUM_THREADS": "1"}
    command = [python, PROGRAM, name, exported, video, out]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=550, check=False, cwd=out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(out) as found:
        return dict(found)


def test_the_tools_own_class_gives_our_features_and_its_tracks_follow_people(tool, exported, video, tmp_path):
    run, folder = exported
    found = run_tool(tool, folder, video, tmp_path / "found.npz")
    encoder, images = package.load(run, device="cpu"), torch.from_numpy(found["images"]).float()
    assert images.shape == (NUM_PEOPLE, 3, *SIZE)
    mean, std = (torch.tensor(encoder.config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        ours = encoder.model((images - mean) / std)
    agreement = compare(ours, torch.from_numpy(found["features"]).float())
    assert agreement.least >= 0.9999
    assert (ours @ ours.T).min() < 0.999  # the people differ
    if tool[0] != "reid":
        assert_followed(found["tracks"], np.load(video / "boxes.npy"))


def assert_followed(tracks: np.ndarray, boxes: np.ndarray) -> None:
    """In the second half of the video each person has a track of its own, the same in every frame."""
    followed = []
    for person in range(NUM_PEOPLE):
        numbers = set()
        for frame in range(NUM_FRAMES // 2, NUM_FRAMES):
            rows = tracks[tracks[:, 0] == frame]
            apart = np.abs(rows[:, 2:6] - boxes[frame, person]).max(axis=1)
            assert apart.min() < 5  # pixels
            numbers.add(int(rows[apart.argmin(), 1]))
        assert len(numbers) == 1
        followed += numbers
    assert len(set(followed)) == NUM_PEOPLE
