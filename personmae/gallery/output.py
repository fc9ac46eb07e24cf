"""An answer as people and programs read it: a table, JSON, or ids alone."""

import math
from typing import Any

from personmae.gallery.catalog import Gallery
from personmae.gallery.facts import in_words
from personmae.gallery.search import Answer, Hit, Query
from personmae.system import files


def to_json(gallery: Gallery, answer: Answer) -> str:
    """JSON: how it was searched, and for each query its names and what was found."""
    queries = [
        {"query": list(query.names), "found": [_record(hit) for hit in hits]}
        for query, hits in zip(answer.queries, answer.hits, strict=True)
    ]
    record = {"gallery": str(gallery.folder), "num_images": len(gallery), "search": answer.how, "queries": queries}
    return files.to_json(record, indent=1)


def _record(hit: Hit) -> dict[str, Any]:
    """A hit without what is not known of it."""
    known = {"rank": hit.rank, "id": hit.id, "score": hit.score}
    known |= {"camera": hit.camera} if hit.camera else {}
    known |= {} if math.isnan(hit.time) else {"time": hit.time}
    return known | ({} if hit.reranked is None else {"reranked": hit.reranked})


def to_ids(answer: Answer) -> str:
    """The ids of all that was found, one a line, as ``personmae gallery remove --ids`` reads them."""
    return "\n".join(dict.fromkeys(hit.id for hits in answer.hits for hit in hits))


def to_table(gallery: Gallery, answer: Answer) -> str:
    """A table for each query. A column that nothing is known for is left out."""
    parts = [_table(gallery, *pair) for pair in zip(answer.queries, answer.hits, strict=True)]
    return "\n\n".join(parts)


def title(query: Query) -> str:
    """A query in a few words."""
    names = ", ".join(query.names[:3])
    return names + (f" and {len(query.names) - 3} more" if len(query.names) > 3 else "")


def _table(gallery: Gallery, query: Query, hits: list[Hit]) -> str:
    if not hits:
        return f"{title(query)}: nothing was found"
    columns = {
        "rank": [str(hit.rank) for hit in hits],
        "score": [f"{hit.score:.4f}" for hit in hits],
        "reranked": [f"{hit.reranked:.4f}" if hit.reranked is not None else "" for hit in hits],
        "camera": [hit.camera for hit in hits],
        "time": [in_words(hit.time, gallery.manifest.times) for hit in hits],
        "id": [hit.id for hit in hits],
    }
    shown = {name: [name, *values] for name, values in columns.items() if any(values)}
    widths = [max(map(len, values)) for values in shown.values()]
    lines = zip(*shown.values(), strict=True)
    return "\n".join([title(query), *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)])
