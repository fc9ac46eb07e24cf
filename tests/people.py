"""A few drawn people: both benchmarks, small enough for a test."""

from personmae.data.pedestrians.plan import SynthSettings


def few_people(num_ids: int = 8, *, distractors: int = 4, junk: int = 3) -> SynthSettings:
    """Settings with so many identities each to train and to test on, in either benchmark."""
    return SynthSettings(
        pool_images=4,
        pool_identities=2,
        market_train_ids=num_ids,
        market_test_ids=num_ids,
        market_distractors=distractors,
        market_junk=junk,
        occluded_duke_train_ids=num_ids,
        occluded_duke_test_ids=num_ids,
    )
