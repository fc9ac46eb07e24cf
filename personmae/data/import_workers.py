"""Worker processes, of an import or an extraction. They end when their parent does, and signals end it in good order."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import cv2

from personmae.errors import Stopped


def prepare(preload: str) -> None:
    """Let another process import ``preload`` for ``workers`` while this one imports its own, given a second core."""
    if (os.cpu_count() or 1) > 1:
        _prepared(preload)
        forkserver.ensure_running()


def _prepared(preload: str) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])  # seconds of imports, once for all
    return context


@contextmanager
def workers(num_processes: int, *, preload: str = "personmae.data.importer") -> Iterator[Executor]:
    """Processes that have imported ``preload``, or one thread of this one. They end when this process does, however it ends."""
    if num_processes == 1:
        thread = ThreadPoolExecutor(1)
        try:
            yield thread
        finally:
            thread.shutdown(cancel_futures=True)
        return
    context = _prepared(preload)
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(num_processes, context, initializer=_become_worker, initargs=(watched, dict(os.environ)))
    try:
        yield pool
        pool.shutdown()
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        watched.close()


def _become_worker(watched: Connection, environ: dict[str, str]) -> None:
    os.environ.clear()  # it is what the first pool of this process found, without credentials that were set since
    os.environ.update(environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all. The parent answers it, and ends this one
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(watched: Connection) -> None:
    """End this process when the other end of a pipe is closed, be it by a kill."""
    watched.poll(None)
    os._exit(1)


def leave_interrupts_to_main() -> None:
    """Block Ctrl-C in this thread and in the processes it starts: those would each show a traceback."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextmanager
def kept_when_stopped() -> Iterator[None]:
    """Let SIGTERM be a Ctrl-C, and say of either, and of the loss of a process, that what is finished is kept.

    Raises:
        Stopped: that has happened.
    """
    try:
        with _sigterm_as_interrupt():
            yield
    except KeyboardInterrupt:
        raise Stopped("interrupted. What is finished is kept: run the same command again to continue") from None
    except BrokenProcessPool as error:
        raise Stopped(
            "a worker process was killed, usually for lack of memory. Run the same command again, with fewer --processes"
        ) from error


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM be a Ctrl-C, where this thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
