"""What something costs, counted instead of timed: the same on every machine and beside whatever else runs there."""

import gc
import sys
from collections.abc import Callable
from typing import Any


def num_calls(work: Callable[[], Any]) -> int:
    """How many functions ``work`` calls in this thread, those of Python and those of C."""
    found = 0

    def count(_frame: Any, event: str, _function: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    collecting = gc.isenabled()
    gc.disable()  # a finalizer of another test's would be counted
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
    return found - 1  # that of setprofile
