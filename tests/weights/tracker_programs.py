"""What trackers do with an exported folder, run by the Python of an environment that has them. It imports nothing of ours.

    PYTHON tracker_programs.py ultralytics|boxmot|reid EXPORTED VIDEO OUT.npz

VIDEO has frames 000001.png ... and ``boxes.npy`` of (frames, people, 4): x0, y0, x1, y1 in pixels. OUT gets what the tool's own
ReID class fed to the network, as RGB in 0 ... 1 (N, 3, H, W), its features (N, D), and the tracks: rows of (frame, track, x0,
y0, x1, y1).
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

IMAGENET_MEAN, IMAGENET_STD = (np.array(v, np.float32)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def video(folder: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Frames, BGR, and boxes."""
    return [np.asarray(cv2.imread(str(path))) for path in sorted(folder.glob("*.png"))], np.load(folder / "boxes.npy")


def scored(boxes: np.ndarray) -> np.ndarray:
    """Boxes of one frame with a confidence and the class 0, which is a person."""
    rest = np.tile(np.array([[0.9, 0.0]], np.float32), (len(boxes), 1))
    return np.concatenate([boxes.astype(np.float32), rest], axis=1)


def with_ultralytics(exported: Path, frames: list[np.ndarray], boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Its ReID class on the first frame, and BoT-SORT on all."""
    reid_module: Any = importlib.import_module("ultralytics.trackers.utils.reid")
    trackers: Any = importlib.import_module("ultralytics.trackers")
    results: Any = importlib.import_module("ultralytics.engine.results")
    utils: Any = importlib.import_module("ultralytics.utils")
    model = str(exported / "onnx" / "unit.onnx")
    encoder = reid_module.ReID(model, device="cpu")
    first = results.Boxes(scored(boxes[0]), frames[0].shape[:2])
    crops = encoder._crop_detections(frames[0], first.xywh)
    features = np.stack(encoder(frames[0], first.xywh))
    settings = utils.YAML.load(utils.ROOT / "cfg" / "trackers" / "botsort.yaml")
    tracker = trackers.BOTSORT(SimpleNamespace(**{**settings, "with_reid": True, "model": model, "device": "cpu"}))
    tracks = []
    for number, (frame, found) in enumerate(zip(frames, boxes, strict=True)):
        rows = tracker.update(results.Boxes(scored(found), frame.shape[:2]), frame)
        tracks += [(number, row[4], *row[:4]) for row in rows]
    return {"images": encoder._crops_to_tensor(crops).numpy(), "features": features, "tracks": np.array(tracks)}


def with_boxmot(exported: Path, frames: list[np.ndarray], boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Its ReID class on the first frame, and BoT-SORT on all."""
    runtime: Any = importlib.import_module("boxmot.reid.core.runtime")
    boxmot: Any = importlib.import_module("boxmot")
    model = exported / "onnx" / "imagenet.onnx"
    encoder = runtime.ReID(model, device="cpu")
    prepared = encoder.preprocess(frames[0], boxes=boxes[0].astype(np.float32))
    features = encoder.postprocess(encoder.process(prepared))
    tracker = boxmot.BotSort(reid_weights=model, device="cpu", use_cmc=False)
    tracks = []
    for number, (frame, found) in enumerate(zip(frames, boxes, strict=True)):
        rows = np.asarray(tracker.update(scored(found), frame))
        tracks += [(number, row[4], *row[:4]) for row in rows]
    fed = prepared["batch"].numpy() * IMAGENET_STD + IMAGENET_MEAN
    return {"images": fed, "features": features, "tracks": np.array(tracks)}


def with_reid(exported: Path, frames: list[np.ndarray], boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Roboflow's model on the first frame. It has no tracker of its own."""
    reid: Any = importlib.import_module("reid")
    supervision: Any = importlib.import_module("supervision")
    model = reid.ReIDModel.from_pretrained(str(exported / "reid"), device="cpu")
    features = model.extract_embeddings(supervision.Detections(xyxy=boxes[0].astype(np.float32)), frames[0])
    crops = [frames[0][y0:y1, x0:x1, ::-1] for x0, y0, x1, y1 in boxes[0].astype(int)]
    images = np.stack(crops).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return {"images": images, "features": features, "tracks": np.empty((0, 6))}


if __name__ == "__main__":
    tool, exported, folder, out = sys.argv[1:]
    programs = {"ultralytics": with_ultralytics, "boxmot": with_boxmot, "reid": with_reid}
    np.savez(out, **programs[tool](Path(exported), *video(Path(folder))))
