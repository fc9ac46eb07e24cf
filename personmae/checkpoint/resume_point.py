"""Which checkpoint a run resumes: the newest usable one of its directory and its store, for all ranks alike.

That there is none, and that there are some and none can be used, are two things: the second ends the run, and nothing is
deleted.
"""

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from personmae import dist
from personmae.checkpoint import commit, portable, remote
from personmae.checkpoint.commit import PASSED_OVER
from personmae.checkpoint.portable import MANIFEST, Checkpoint, Fault
from personmae.checkpoint.remote import Damaged
from personmae.errors import RankError, RankUnavailable, Unavailable, UserError, is_passing


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that a run goes on from. Without ``moments`` those are not there, or cannot be used."""

    path: Path
    moments: bool = True

    def read(self) -> Checkpoint:
        """What is in it."""
        return portable.read(self.path, moments=self.moments)

    def log_new_moments(self, step: int, total_steps: int) -> None:
        """Log on the first rank that a run which is not complete goes on with new moments."""
        if not self.moments and step < total_steps and dist.is_first():
            print(f"checkpoint {self.path}: its moments cannot be used, the optimizer goes on with new ones", flush=True)


def newest(run_dir: str | Path, upload_to: str | None = None, *, rebuild_moments: bool = False) -> Found | None:
    """The newest usable checkpoint of a run directory and its store, on this host: it is fetched if need be.

    None where there is no checkpoint in either place. A complete run may lack its moments. With ``rebuild_moments`` one whose
    moments alone are missing or damaged is taken where none is whole.

    Raises:
        UserError: the store cannot be read, or there are checkpoints and all are damaged.
        Unavailable: there are some and one of them, or the store, may be readable another time.
    """
    return _Search(run_dir, upload_to, rebuild_moments).next()


def newest_for_all(run_dir: str | Path, upload_to: str | None = None, *, rebuild_moments: bool = False) -> Found | None:
    """``newest``, decided by the first rank. Hosts that do not have it fetch it, and if one cannot, all take the next.

    One rank of each host checks every hash. The first must hold the run's lock, for it may rename what a kill has left.

    Raises:
        UserError, Unavailable: as ``newest``. Or a host sees neither the run directory of the first nor a store.
    """
    search = _Search(run_dir, upload_to, rebuild_moments) if dist.is_first() else None
    while offer := _offer(search):
        path, trouble = None, None
        try:
            path = _take(run_dir, upload_to, *offer)
        except (Damaged, UserError, Unavailable, OSError) as error:
            trouble = error
        passes = isinstance(trouble, Unavailable) or is_passing(trouble)
        ends = isinstance(trouble, UserError | OSError) and not passes
        ended, passing, refused = dist.any_ranks(ends, passes, trouble is not None)
        if ended or passing:
            if ends or passes:
                assert trouble
                raise trouble
            raise (UserError if ended else Unavailable)(f"another host cannot read {offer[0].path}: see there")
        if path and not refused:
            if not offer[0].moments:
                dist.on_first_rank(lambda: search and search.set_aside_to(offer[0].path))
            return Found(path, offer[0].moments)
        if isinstance(trouble, Damaged):
            portable.log_passed_over(offer[0].path, f"on this host, {trouble}")
        if search:
            search.refuse(offer[0])
    return None


class _Search:
    """A run's checkpoints on this host, newest first, of equal ones the local. What is passed over is logged and remembered."""

    def __init__(self, run_dir: str | Path, upload_to: str | None, rebuild_moments: bool):
        self._run_dir, self._upload_to, self._rebuild = run_dir, upload_to, rebuild_moments
        self._passed: list[tuple[str | Path, Fault]] = []
        self._found: Iterator[Found] = self._usable()
        self._shared = set[Path]()

    def next(self) -> Found | None:
        """The next one that can be used. None where there is none of any kind.

        Raises:
            UserError, Unavailable: there are some, and none (more) can be used.
        """
        if found := next(self._found, None):
            return found
        if not any(self._counts(where, fault) for where, fault in self._passed):
            return None
        advice = (
            "bring an undamaged copy back, or start anew with checkpoint.resume=none, which moves these to "
            f"checkpoints/{PASSED_OVER}"
        )
        if whole := [where for where, fault in self._passed if fault.only_moments and not self._rebuild]:
            advice += (
                f". Of {whole[0]} weights and state are whole: checkpoint.rebuild_moments=true goes on from there with new "
                "moments of the optimizer"
            )
        raise portable.none_usable(self._run_dir, self._passed, advice)

    def refuse(self, found: Found) -> None:
        """What another host can neither see nor fetch is offered once more, from the store. Then it is passed over."""
        if self._upload_to and found.path not in self._shared and self._share(self._upload_to, found.path):
            self._found = itertools.chain([found], self._found)
        else:
            self._passed.append((found.path, Fault("another host can neither see nor fetch it")))
        self._shared.add(found.path)

    def set_aside_to(self, path: Path) -> None:
        """Move what was passed over out of the way, up to the step of the one that is taken: a run counts those as its own.

        What lies beyond moves with the first commit.

        Raises:
            OSError, UserError, Unavailable: something cannot be moved.
        """
        taken = portable.step_of(path.name) or 0
        moved = []
        for where, _ in self._passed:
            step = portable.step_of(Path(where).name) or 0
            if step > taken:
                continue
            if isinstance(where, Path):
                moved += [commit.move_aside(where)] if os.path.lexists(where) and where != path else []
            elif step < taken and (upload_to := self._upload_to):
                moved.append(remote.reaching(lambda upload_to=upload_to, step=step: remote.set_aside(upload_to, step)))
        commit.log_moved([str(place) for place in moved if place])

    def _share(self, upload_to: str, path: Path) -> bool:
        """Upload a checkpoint that may never have got to the store. Returns whether it is there now."""
        try:
            remote.reaching(
                lambda: remote.patiently(lambda: remote.send(upload_to, path, portable.step_of(path.name) or 0, set()))
            )
        except (UserError, Unavailable) as error:
            print(f"checkpoint {path} cannot be given to the other hosts: {error}", flush=True)
            return False
        return True

    def _counts(self, where: str | Path, fault: Fault) -> bool:
        """Whether something was a checkpoint once. In a store, an upload that was cut short has no manifest."""
        return isinstance(where, Path) or not fault.absent or fault.only_moments

    def _usable(self) -> Iterator[Found]:
        last, lame = None, []
        for step, path in self._places():
            if step == last:
                continue
            try:
                found = Found(self._checked(path) if path else self._fetch(step))
            except Damaged as damage:
                if damage.fault.spares_weights and (found := self._complete(step, path)):
                    last = step
                    yield found
                    continue
                self._pass_over(path or self._name(step), damage.fault)
                if damage.fault.only_moments:
                    lame.append((step, path))
                continue
            last = step
            yield found
        for step, path in lame if self._rebuild else ():
            try:
                found = Found(path or self._fetch(step, moments=False), moments=False)
            except Damaged as damage:  # since it was looked at
                self._pass_over(self._name(step), damage.fault)
                continue
            yield found

    def _places(self) -> list[tuple[int, Path | None]]:
        """Step and folder, without one where it lies in the store, newest first."""
        try:
            places: list[tuple[int, Path | None]] = [
                (portable.step_of(path.name) or 0, path) for path in portable.folders(self._run_dir)
            ]
        except OSError as error:
            if not is_passing(error):
                raise
            raise Unavailable(f"{error.filename} cannot be listed: {error.strerror}. This may pass: run this again") from error
        if upload_to := self._upload_to:
            places += [(step, None) for step in remote.reaching(lambda: remote.patiently(lambda: remote.steps(upload_to)))]
        return sorted(places, key=lambda place: (place[0], place[1] is not None), reverse=True)

    def _checked(self, path: Path) -> Path:
        if fault := portable.find_fault(path):
            raise Damaged(fault)
        return path

    def _fetch(self, step: int, *, moments: bool = True) -> Path:
        upload_to = self._upload_to or ""
        path = remote.reaching(lambda: remote.fetch(upload_to, step, portable.folder(self._run_dir), moments=moments))
        remote.reaching(lambda: remote.bring_records(upload_to, step, Path(self._run_dir)))
        return path

    def _complete(self, step: int, path: Path | None) -> Found | None:
        """One whose moments were deleted, where its run has come to the end: it needs them no more."""
        try:
            path = path or self._fetch(step, moments=False)
        except Damaged:  # since it was looked at. It is passed over for its moments
            return None
        return None if portable.unfinished(path) else Found(path, moments=False)

    def _pass_over(self, where: str | Path, fault: Fault) -> None:
        portable.log_passed_over(where, fault)
        self._passed.append((where, fault))

    def _name(self, step: int) -> str:
        return f"{self._upload_to}/{portable.name_of(step)}"


def _offer(search: _Search | None) -> tuple[Found, str] | None:
    """The first rank's next checkpoint and its digest, on all ranks. Its error is raised on all, to end alike."""
    answer: dict[str, str | bool] = {}
    mine: Exception | None = None
    if search:
        try:
            if found := search.next():
                path = commit.settle(found.path)  # now, while no rank reads it yet
                answer = {"path": str(path), "digest": portable.digest(path), "moments": found.moments}
        except Exception as error:  # whatever it is: the other ranks wait for a word
            mine = error
            answer = {"error": str(error), "passing": is_passing(error) or not isinstance(error, UserError | OSError)}
    answer = json.loads(dist.from_first_rank(json.dumps(answer)))
    if "error" in answer:
        raise mine or (Unavailable if answer["passing"] else UserError)(answer["error"])
    return (Found(Path(str(answer["path"])), bool(answer["moments"])), str(answer["digest"])) if answer else None


def _take(run_dir: str | Path, upload_to: str | None, offered: Found, digest: str) -> Path:
    """The checkpoint that the first rank offers, on this host. ``RUN/fetched`` holds one that had to be fetched."""
    if dist.is_first() or not (fault := _fault_here(offered.path, digest, offered.moments)):
        return offered.path
    if not upload_to and fault.passing:
        raise RankUnavailable(f"checkpoint {offered.path} cannot be used on this host: {fault}. This may pass: run this again")
    if not upload_to:
        raise RankError(f"run_dir must lie on storage that all hosts share. This one does not see {offered.path}: {fault}")
    directory = Path(run_dir) / "fetched"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # one rank of a host fetches for all
        step = portable.step_of(offered.path.name) or 0
        found = directory / portable.name_of(step)
        if _fault_here(found, digest, offered.moments):
            for path in directory.glob("*step-*"):
                shutil.rmtree(path, ignore_errors=True)  # one that stays keeps nothing else
            try:
                remote.reaching(lambda: remote.fetch(upload_to, step, directory, digest, moments=offered.moments))
            except UserError as error:
                raise RankError(str(error)) from error
            except Unavailable as error:
                raise RankUnavailable(str(error)) from error
    return found


def _fault_here(path: Path, digest: str, moments: bool) -> Fault | None:
    """Why a folder is not the checkpoint of this digest on this host, or None.

    One rank of a host checks its files, and its word counts for all.
    """
    try:
        theirs = portable.digest(path)
    except OSError as error:
        return portable.unreadable(MANIFEST, error)
    if theirs != digest:
        return Fault("it is another one")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    fault = portable.find_fault(path)
    return None if fault and fault.only_moments and not moments else fault
