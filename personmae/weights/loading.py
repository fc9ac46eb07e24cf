"""A model for a command: what loading has to say is a line of the log, not a warning of Python's."""

import warnings
from collections.abc import Callable
from typing import Any

from personmae.weights.encoder import Encoder, load


def load_for_command(where: str, log: Callable[[str], None], **options: Any) -> Encoder:
    """As ``load``.

    Raises:
        UserError: as ``load``.
        Unavailable: as ``load``.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        encoder = load(where, **options)
    for warning in said:
        log(str(warning.message))
    return encoder
