"""Python programs as real processes without their start: a server that has imported everything forks each of them.

``start(["-m", "personmae", ...])`` is ``subprocess.Popen([sys.executable, "-m", "personmae", ...])``: a process of its own with
its own environment, directory, output, signals and exit code. What it saves is the imports and the taking apart of all modules
at the end, several seconds of CPU time. A test of the start itself, of memory or of what is imported uses ``subprocess``.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
# Not the programs themselves: a module that is run should not have been imported before.
PRELOADED = (
    *("torch.distributed.run", "torch.utils.tensorboard", "cv2", "scipy.sparse", "sklearn.cluster", "boto3"),
    *("personmae.commands.training", "personmae.commands.data", "personmae.commands.inspect", "personmae.data.importer"),
    *("personmae.pretrain", "personmae.finetune", "personmae.unsupervised", "personmae.evaluate", "personmae.dry_run"),
    *("personmae.engine.native", "personmae.engine.deepspeed", "personmae.engine.fsdp", "personmae.report.report"),
    *("personmae.gallery.edit", "personmae.gallery.search", "personmae.gallery.sheet", "personmae.serve.server"),
    *(
        "launcher.elastic.agent",
        "launcher.elastic.store",
        "launcher.elastic.options",
        "launcher.cluster.cli",
        "launcher.cluster.commands",
        "launcher.program",
    ),
)
# Read while a library is loaded, so they hold for all processes of the server.
FIXED = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
_FIXED_BEGINNINGS = ("LD_", "PYTHONHASH", "PYTHONUTF8", "PYTHONIO", "MALLOC_", "ONEDNN_", "MKL_", "KMP_", "LC_", "LANG")


class Process:
    """A process of the server, used as a ``subprocess.Popen``."""

    def __init__(self, args: list[str], pid: int, status: int, *files: IO[Any] | None) -> None:
        self.args, self.pid = args, pid
        self.stdin, self.stdout, self.stderr = files
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it is still at work.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            output = os.read(self._status, 16)
            os.close(self._status)
            self.returncode = int(output) if output else -signal.SIGKILL  # the server is gone, and all its processes
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """All of the output of a process that was started with pipes, and its end."""
        if self.stdin:
            self.stdin.close()
        texts: dict[Any, list[Any]] = {file: [] for file in (self.stdout, self.stderr) if file}
        deadline = None if timeout is None else time.monotonic() + timeout
        opened = list(texts)
        while opened:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not (ready := select.select(opened, [], [], left)[0]):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            for file in ready:
                if piece := os.read(file.fileno(), 1 << 16):
                    texts[file].append(piece)
                else:
                    opened.remove(file)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        whole: dict[Any, Any] = {}
        for file, pieces in texts.items():
            whole[file] = b"".join(pieces).decode() if hasattr(file, "encoding") else b"".join(pieces)
            file.close()
        return whole.get(self.stdout), whole.get(self.stderr)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.stdin, self.stdout, self.stderr):
            if file:
                file.close()
        self.wait()

    def __del__(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(OSError):
                os.close(self._status)


def start(
    args: Sequence[str | Path | int],
    *,
    cwd: str | Path = ROOT,
    env: Mapping[str, str] | None = None,
    stdin: int | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    text: bool = False,
    start_new_session: bool = False,
) -> Process:
    """Start what ``python ARGS`` would: ``-m MODULE``, ``-c CODE`` or a file, after ``-u`` where wanted.

    Raises:
        ValueError: the environment differs in what was read when the server was started; use ``subprocess`` for that.
    """
    environ = dict(os.environ if env is None else env) | {k: FIXED[k] for k in FIXED if env is None or k not in env}
    server = _server()
    differ = {name for name in {*environ, *server.environ} if environ.get(name) != server.environ.get(name) and _is_fixed(name)}
    if differ:
        raise ValueError(f"a warm process cannot have another {', '.join(sorted(differ))}")
    line = [str(arg) for arg in args]
    job = {"args": line, "cwd": str(cwd), "env": environ, "new_session": start_new_session}
    into, in_end = _end_of(stdin, text, reads=True)
    out, out_end = _end_of(stdout, text)
    err, err_end = (None, out_end) if stderr == subprocess.STDOUT else _end_of(stderr, text)
    try:
        pid, status = server.fork(job, in_end, out_end, err_end)
    finally:
        for end, given in ((in_end, stdin), (out_end, stdout), (err_end, stderr)):
            if given == subprocess.PIPE:
                os.close(end)
    return Process(line, pid, status, into, out, err)


def run(
    args: Sequence[str | Path | int], *, cwd: str | Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 120
) -> "subprocess.CompletedProcess[str]":
    """``subprocess.run`` of ``python ARGS`` with captured text."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = start(args, cwd=cwd, env=env, stdout=out, stderr=err)
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
        return subprocess.CompletedProcess(process.args, code, *texts)


def _is_fixed(name: str) -> bool:
    return name in FIXED or name.startswith(_FIXED_BEGINNINGS)


def _end_of(wanted: int | IO[Any] | None, text: bool, *, reads: bool = False) -> tuple[IO[Any] | None, int]:
    """This process's file, if it has one, and the descriptor for the other, which reads from it or writes to it."""
    if wanted == subprocess.PIPE:
        source, sink = os.pipe()
        here, there, mode = (sink, source, "w") if reads else (source, sink, "r")
        return (os.fdopen(here, mode) if text else os.fdopen(here, f"{mode}b", buffering=0)), there
    if wanted in (None, subprocess.DEVNULL):
        return None, _devnull()
    return None, wanted if isinstance(wanted, int) else wanted.fileno()


_NULL: list[int] = []
_SERVERS: list["_Server"] = []


def _devnull() -> int:
    if not _NULL:
        _NULL.append(os.open(os.devnull, os.O_RDWR))
    return _NULL[0]


def _server() -> "_Server":
    if not _SERVERS:
        _SERVERS.append(_Server())
        atexit.register(_SERVERS[0].close)
    return _SERVERS[0]


class _Server:
    """This end of the server: it is started once in a test process and ends with it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.environ = os.environ | FIXED
        with theirs:
            command = [sys.executable, "-W", "ignore", __file__, str(theirs.fileno())]
            keep = [theirs.fileno()]
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.environ, pass_fds=keep, start_new_session=True)
        self._socket = ours

    def fork(self, job: dict[str, Any], stdin: int, stdout: int, stderr: int) -> tuple[int, int]:
        """Another process of the server: its number, and where its exit code can be read."""
        status, output = os.pipe()
        with tempfile.TemporaryFile() as file:
            file.write(json.dumps(job).encode())
            file.flush()
            socket.send_fds(self._socket, [b"x"], [file.fileno(), stdin, stdout, stderr, output])
        os.close(output)
        if not (answer := self._socket.recv(16)):
            raise RuntimeError(f"the server of warm processes has ended with {self.process.wait()}")
        return int(answer), status

    def close(self) -> None:
        self._socket.close()
        self.process.wait()


# --- the server's own process ---


def serve(channel: socket.socket) -> dict[str, Any]:
    """Fork for each job, which is returned in its child, until the tests have gone."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would otherwise copy every page
    alarm, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}
    while True:
        ready = select.select([channel, alarm], [], [])[0]
        if alarm in ready:
            os.read(alarm, 1 << 12)
            _tell_ends(statuses)
        if channel not in ready:
            continue
        data, fds, *_ = socket.recv_fds(channel, 1, 5)
        if not data:
            for pid in statuses:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        paper, *ends, output = fds
        with os.fdopen(paper, "rb") as file:
            file.seek(0)
            job = json.load(file)
        if not (pid := os.fork()):
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
            for number, end in enumerate(ends):
                os.dup2(end, number)
            for fd in (alarm, woken, *ends, output, *statuses.values()):
                os.close(fd)
            channel.close()
            return job
        for end in ends:
            os.close(end)
        statuses[pid] = output
        channel.sendall(str(pid).encode())


def _tell_ends(statuses: dict[int, int]) -> None:
    while statuses:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        output = statuses.pop(pid)
        os.write(output, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(output)


def _open_streams(*, unbuffered: bool) -> None:
    """New ones, for what a stream can do is found out when it is opened."""
    sys.stdin = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)  # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        new = open(number, "w", buffering=1 if number == 2 else -1, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
        new.reconfigure(line_buffering=number == 2 or new.isatty(), write_through=unbuffered)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def become(job: dict[str, Any]) -> None:
    """Do what the interpreter does with a command line."""
    if job["new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    args = job["args"]
    _open_streams(unbuffered=args[0].startswith("-u") or bool(os.environ.get("PYTHONUNBUFFERED")))
    if args[0].startswith("-u"):
        args = [f"-{args[0][2:]}", *args[1:]] if len(args[0]) > 2 else args[1:]
    if args[0] in ("-m", "-c"):
        sys.path[0] = ""
        sys.argv = [args[0], *args[2:]]
        if args[0] == "-m":
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            exec(compile(args[1], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        return
    sys.argv = args
    sys.path[0] = str(Path(args[0]).resolve().parent)
    runpy.run_path(args[0], run_name="__main__")


def end_with(job: dict[str, Any]) -> NoReturn:
    """Do a job and end as an interpreter does, but for the modules, which are not taken apart: it would take two seconds."""
    code, interrupted = 0, False
    try:
        become(job)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # type: ignore[attr-defined] - waits for threads that are no daemons
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        file.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    end_with(serve(socket.socket(fileno=int(sys.argv[1]))))
