"""The images that an import left out: a summary by kind with an example of each, and the limit on their share."""

import json
import math
from collections.abc import Sequence

from personmae.errors import TooManyRejects, UserError
from personmae.system import storage

REJECTS = "rejects.jsonl"  # {"key", "reason", "kind"} of each image that was left out
Reject = dict[str, str]


def check_share(share: float) -> None:
    """Raise a UserError unless ``share`` is one."""
    if not 0 <= share <= 1:
        raise UserError(f"--max-rejects must be a share from 0 to 1, got {share:g}. 0.05 is 5 in 100")


def read(root: str) -> list[Reject]:
    """The list that an import wrote. Empty where nothing was left out."""
    return [json.loads(line) for line in (storage.read(root, REJECTS) or b"").splitlines()]


def summary(rejects: Sequence[Reject]) -> str:
    """How many of each kind, the most frequent first, with the first of each: '2 empty (first: a.jpg: it is empty)'."""
    kinds: dict[str, list[Reject]] = {}
    for reject in rejects:
        kinds.setdefault(reject.get("kind", "cannot be decoded"), []).append(reject)
    by_number = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    named = [(kind, of, of[0]["key"].replace("\n", "\\n")) for kind, of in by_number]
    return "; ".join(f"{len(of):,} {kind} (first: {name}: {of[0]['reason']})" for kind, of, name in named)


def check(rejects: Sequence[Reject], num_images: int, max_rejects: float, root: str) -> None:
    """Refuse an import that leaves out more than ``max_rejects`` of its images.

    Raises:
        TooManyRejects: it does. Written shards stay, so the same command with a larger share has little left to do.
    """
    otherwise = f", which ends at once, or fix the source, delete {root} and start again"
    check_listed(rejects, num_images, max_rejects, f"{root.rstrip('/')}/{REJECTS}", otherwise)


def check_listed(rejects: Sequence[Reject], num_images: int, max_rejects: float, listed: str, otherwise: str) -> None:
    """As ``check``, for rejects that are ``listed`` elsewhere. ``otherwise`` ends the advice to take a larger share.

    Raises:
        TooManyRejects: more than ``max_rejects`` are left out.
    """
    share = len(rejects) / num_images
    if share <= max_rejects:
        return
    enough = math.ceil(100 * share) / 100
    raise TooManyRejects(
        f"at most {max_rejects:.4g} of the images may be left out (--max-rejects). {len(rejects):,} of {num_images:,} are "
        f"({share:.1%}): {summary(rejects)}. All are listed in {listed}. Take the rest with --max-rejects {enough:g}{otherwise}"
    )
