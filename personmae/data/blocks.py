"""The last few blocks of large files, so that neighbouring images in them are read once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Content = TypeVar("Content")


class Recent(Generic[Content]):
    """The ``most`` blocks that were asked for last. Threads that want the same one wait for the first of them."""

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._blocks: OrderedDict[Hashable, Future[Content]] = OrderedDict()

    def get(self, identity: Hashable, load: Callable[[], Content]) -> Content:
        with self._lock:
            is_new = identity not in self._blocks
            block = self._blocks.setdefault(identity, Future())
            self._blocks.move_to_end(identity)
            while len(self._blocks) > self._most:
                self._blocks.popitem(last=False)
        if is_new:
            try:
                block.set_result(load())
            except BaseException as error:
                with self._lock:
                    self._blocks.pop(identity, None)  # the next one tries again
                block.set_exception(error)
        return block.result()
