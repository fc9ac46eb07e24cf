"""The contact sheet: one image with samples of everything that was drawn."""

from dataclasses import asdict

import cv2
import numpy as np

from personmae.synthetic.canvas import Image
from personmae.synthetic.image import draw_shot
from personmae.synthetic.plan import Shot, SynthSettings
from personmae.synthetic.wardrobe import LOOK_ALIKES, identity_of

TILE = (192, 96)  # height, width in pixels
SHEET_COLUMNS = 14


def contact_sheet(settings: SynthSettings, shots: list[Shot]) -> Image:
    """One image with samples of every folder, one identity over its cameras, look-alikes and hard cases."""
    folders = {
        name: [s for s in shots if s.path.startswith(name)]
        for name in ("pool", "market1501/b", "market1501/q", "occluded_duke/b", "occluded_duke/q")
    }
    gallery = [s for s in folders["market1501/b"] if s.split == "market_test"]
    a, b = (asdict(identity_of(settings.seed, "market_test", subject)) for subject in (0, 1))
    detail = next(name for name in a if a[name] != b[name])
    pool, stride = folders["pool"], max(1, len(folders["pool"]) // SHEET_COLUMNS)
    alike = [s for s in gallery if s.subject < LOOK_ALIKES and s.image % 2 == 0]
    rows = {
        "pool": pool[::stride],
        "pool, more": pool[7::stride],
        "market: one identity over cameras": [s for s in gallery if s.subject == LOOK_ALIKES],
        f"market: three look-alikes, the {detail} differs": alike,
        "market: query": folders["market1501/q"][:: settings.queries_per_id],
        "market: train": [s for s in folders["market1501/b"] if s.split == "market_train"][::9],
        "market: distractors": [s for s in folders["market1501/b"] if s.split == "market_distractor"],
        "market: junk": [s for s in folders["market1501/b"] if s.framing == "junk"],
        "occluded_duke: query": folders["occluded_duke/q"],
        "occluded_duke: gallery of the same": [s for s in folders["occluded_duke/b"] if s.split == "duke_test"][::2],
    }
    return np.vstack([_sheet_row(settings, caption, row[:SHEET_COLUMNS]) for caption, row in rows.items() if row])


def _sheet_row(settings: SynthSettings, caption: str, shots: list[Shot]) -> Image:
    height, width = TILE
    row = np.full((height + 34, SHEET_COLUMNS * (width + 6), 3), 250, np.uint8)
    cv2.putText(row, caption, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    for column, shot in enumerate(shots):
        image, _ = draw_shot(settings, shot)
        factor = min(height / image.shape[0], width / image.shape[1])
        tile = cv2.resize(image, (round(image.shape[1] * factor), round(image.shape[0] * factor)))
        x = column * (width + 6)
        row[20 : 20 + tile.shape[0], x : x + tile.shape[1]] = tile
        label = f"{shot.subject} c{shot.camera + 1} {image.shape[0]}px"
        cv2.putText(row, label, (x, height + 30), cv2.FONT_HERSHEY_SIMPLEX, 0.33, (70, 70, 70), 1, cv2.LINE_AA)
    return row
