"""mAP by the camera of the query and that of its matches, as tables whose cells have the stronger a colour the higher."""

from typing import Any, Final

import numpy as np

from personmae.report.comparison import Group, Row
from personmae.report.records import CameraPairs

LEVELS: Final = 5  # of the colours in report.css.j2
_UNKNOWN = -1


def tables_of(group: Group) -> list[dict[str, Any]]:
    """One for each row with pairs of known cameras, the best mAP first. All have one scale, so that colours compare."""
    found = [(row, pairs, scores) for row in group.rows if (pairs := _first(row)) and (scores := mean_of(row)) is not None]
    found = [each for each in found if np.isfinite(each[2]).sum() > 1]
    known = np.concatenate([scores[np.isfinite(scores)] for _, _, scores in found]) if found else np.zeros(1)
    scale = float(known.min()), float(known.max())
    ordered = sorted(found, key=lambda each: -each[0].mean("mAP"))
    return [_table(row, pairs, scores, scale) for row, pairs, scores in ordered]


def mean_of(row: Row) -> np.ndarray | None:
    """Mean mAP over the runs of a row, (query cameras, gallery cameras), NaN where no query has a match.

    None where a run has no pairs, or those of other cameras.
    """
    found = [result.camera_pairs for result in row.results]
    pairs = [each for each in found if each is not None]
    if len(pairs) < len(found) or len({(*each.query_cameras, None, *each.gallery_cameras) for each in pairs}) != 1:
        return None
    return np.mean([_numbers(each) for each in pairs], axis=0)


def _numbers(pairs: CameraPairs) -> np.ndarray:
    return np.array([[np.nan if score is None else score for score in line] for line in pairs.mAP], dtype=float)


def _first(row: Row) -> CameraPairs | None:
    return row.first.camera_pairs


def _table(row: Row, pairs: CameraPairs, scores: np.ndarray, scale: tuple[float, float]) -> dict[str, Any]:
    lines = [
        {
            "camera": camera_name(camera),
            "cells": [_cell(score, count, scale) for score, count in zip(line, counts, strict=True)],
        }
        for camera, line, counts in zip(pairs.query_cameras, scores.tolist(), pairs.num_queries, strict=True)
    ]
    return {
        "name": row.name,
        "seeds": row.seeds_in_words,
        "words": in_words(pairs, scores),
        "cameras": [camera_name(camera) for camera in pairs.gallery_cameras],
        "lines": lines,
    }


def _cell(score: float, count: int, scale: tuple[float, float]) -> dict[str, Any]:
    """A cell's number, how many queries it is of, and its level from 1 to ``LEVELS``. 0 where there is no number."""
    if not np.isfinite(score):
        return {"text": "–", "count": "", "level": 0}
    low, high = scale
    share = (score - low) / (high - low) if high > low else 0.0
    return {"text": f"{100 * score:.1f}", "count": f"{count:,}", "level": 1 + min(int(LEVELS * share), LEVELS - 1)}


def in_words(pairs: CameraPairs, scores: np.ndarray) -> str:
    """The extremes of a table as a sentence, and the mean of its pairs."""

    def name(place: int) -> str:
        row, column = np.unravel_index(place, scores.shape)
        return f"from camera {camera_name(pairs.query_cameras[row])} to {camera_name(pairs.gallery_cameras[column])}"

    best, worst, count = int(np.nanargmax(scores)), int(np.nanargmin(scores)), int(np.isfinite(scores).sum())
    return (
        f"Highest {name(best)} with {100 * scores.flat[best]:.1f} %, lowest {name(worst)} with "
        f"{100 * scores.flat[worst]:.1f} %. The mean of the {count} pairs is {100 * np.nanmean(scores):.1f} %."
    )


def camera_name(camera: int) -> str:
    return "unknown" if camera == _UNKNOWN else str(camera)
