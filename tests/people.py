"""A few drawn people: both benchmarks, small enough for a test."""

from pathlib import Path

from personmae.synthetic.benchmarks import write_synthetic
from personmae.synthetic.plan import SynthSettings

# What the quickstart's USL takes for its 300 people finds no clusters among so few.
FEW_CLUSTERS = (
    *("cluster.k1=8", "cluster.k2=3", "cluster.eps=0.3", "cluster.min_samples=2", "cluster.per_camera=standardise"),
    *("cluster.drop_one_camera=false", "feature.pool=mean", "feature.whiten_retrieval=false"),
    *("memory.temperature=0.05", "memory.momentum=0.1", "optim.kind=sgd", "optim.schedule=step", "optim.lr=2e-3"),
)


def draw_few_people(folder: Path, num_ids: int = 8, *, distractors: int = 4, junk: int = 3) -> Path:
    """Both benchmarks with so many identities each to train and to test on; returns ``folder``/data, which has them."""
    settings = SynthSettings(
        pool_images=4,
        pool_identities=2,
        market_train_ids=num_ids,
        market_test_ids=num_ids,
        market_distractors=distractors,
        market_junk=junk,
        occluded_duke_train_ids=num_ids,
        occluded_duke_test_ids=num_ids,
    )
    write_synthetic(folder / "data", settings, num_processes=1)
    return folder / "data"
