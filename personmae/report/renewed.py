"""Results of the user's own data whose digest is an earlier one, which depended on whether training images were read.

Fine-tuned runs and probes had that one, and evaluations another. Where the data are still there, both are shown to be one.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from personmae.errors import UserError
from personmae.reid.datasets import OWN, renewed_digest
from personmae.report.places import Place
from personmae.report.records import Queries, Result, TrainedOn

RecordT = TypeVar("RecordT", Result, Queries)


def new_digests(found: Iterable[tuple[Result, Place]]) -> dict[str, str]:
    """The digest that data have now, by the earlier one. Data are read only where results of a user's own have several."""
    own = {
        (data.benchmark_digest, data.benchmark, data.root): place
        for result, place in found
        for data in (result, result.trained_on)
        if data and data.benchmark in OWN and data.benchmark_digest and data.root
    }
    if len({digest for digest, _, _ in own}) < 2:
        return {}
    new = ((digest, _renewed(digest, name, root, place)) for (digest, name, root), place in own.items())
    return {earlier: digest for earlier, digest in new if earlier != digest}


def _renewed(digest: str, name: str, root: str, place: Place) -> str:
    try:
        return renewed_digest(digest, name, place.find(root))
    except UserError:  # the data are gone
        return digest


def renew(record: RecordT | None, digests: Mapping[str, str]) -> RecordT | None:
    """A record with the digests that its data have now."""
    if record is None:
        return None
    changes: dict[str, object] = {"benchmark_digest": digests.get(record.benchmark_digest or "", record.benchmark_digest)}
    if isinstance(record, Result) and record.trained_on:
        changes["trained_on"] = _renew_training(record.trained_on, digests)
    return record.model_copy(update=changes)


def _renew_training(data: TrainedOn, digests: Mapping[str, str]) -> TrainedOn:
    return data.model_copy(update={"benchmark_digest": digests.get(data.benchmark_digest or "", data.benchmark_digest)})
