"""The models of the page, which are loaded while it is served already."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from personmae.errors import Unavailable, UserError
from personmae.serve.limits import Refusal, later

ABSENT, LOADING, READY, FAILED = "absent", "loading", "ready", "failed"
_SOON: Final = 3  # seconds after which to ask again
Kind = TypeVar("Kind")
Log = Callable[[str], None]


@dataclass
class Slot(Generic[Kind]):
    """A model on its way in. ``what`` names it to a visitor, ``remedy`` says how to get it."""

    what: str
    remedy: str
    state: str = ABSENT
    value: Kind | None = None

    def get(self) -> Kind:
        """The model.

        Raises:
            Refusal: 503, it is still loaded, or 409, there is none.
        """
        if self.state == LOADING:
            raise later(503, f"the {self.what} is being loaded: try again in a moment", _SOON)
        if self.state != READY or self.value is None:
            raise Refusal(409, f"there is no {self.what} here: {self.remedy}")
        return self.value


class Models:
    """An encoder that searches, and a pre-trained model that reconstructs. Either may be absent.

    ``log`` takes lines. ``end`` is called where a model that was asked for cannot be loaded, and ``error`` says why.
    """

    def __init__(self, log: Log, end: Callable[[], None] = lambda: None):
        self._log, self._end = log, end
        self.encoder: Slot[Any] = Slot("model for uploads", "start it with --model RUN, the model of the gallery's features")
        self.pretrained: Slot[Any] = Slot("pre-trained model", "start it with --pretrained RUN")
        self.error: UserError | Unavailable | None = None

    def load(self, wanted: list[tuple[Slot[Any], Callable[[], Any], bool]]) -> threading.Thread:
        """Load models one after the other: the slot, what loads it, and whether the server ends where that fails."""
        for slot, _, _ in wanted:
            slot.state = LOADING
        thread = threading.Thread(target=self._load, args=(wanted,), name="models", daemon=True)
        thread.start()
        return thread

    def _load(self, wanted: list[tuple[Slot[Any], Callable[[], Any], bool]]) -> None:
        for slot, open_model, is_required in wanted:
            began = time.monotonic()
            try:
                slot.value = open_model()
                slot.state = READY
                self._log(f"the {slot.what} is ready after {time.monotonic() - began:.1f} s")
            except (UserError, Unavailable) as error:
                self._fail(slot, error, is_required)
            except BaseException:
                for left in (one for one, _, _ in wanted if one.state == LOADING):
                    left.state = FAILED  # for nobody loads it any more
                raise

    def _fail(self, slot: Slot[Any], error: UserError | Unavailable, is_required: bool) -> None:
        slot.state = FAILED
        if is_required:
            self.error = error
            self._end()
        else:
            self._log(f"uploads cannot be searched for: {error}")
