"""A bucket as a source, over real HTTP (moto), and one import that several hosts share."""

import io
import json
import os
import re
import shutil
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import EndpointConnectionError
from urllib3.response import HTTPResponse

from personmae.__main__ import main
from personmae.data import files, importer
from personmae.data.files import BucketFiles
from personmae.data.importer import Part
from personmae.data.selection import Selection
from personmae.data.sources import open_source
from personmae.errors import Stopped, UserError
from personmae.monitor import progress
from personmae.system import storage

NUM_IMAGES = 50
SHARD_BYTES = 20_000


@pytest.fixture
def bucket(s3_server, images) -> str:
    """The images as objects below a prefix with characters of their own, beside others."""
    name = s3_server.bucket("crops")
    for path in images.rglob("*.jp*g"):
        s3_server.client.upload_file(str(path), name, f"a #1/{path.relative_to(images).as_posix()}")
    for key in ("a #1/note.txt", "a #1/.hidden.jpg", "a #1/.cache/x.jpg", "a #1/more/", "a #10/other.jpg", "a/other.jpg"):
        s3_server.client.put_object(Bucket=name, Key=key, Body=b"x")
    return name


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def objects(s3_server, bucket: str, prefix: str) -> dict[str, bytes]:
    keys = [key for key in s3_server.keys(bucket) if key.startswith(prefix)]
    return {key.removeprefix(prefix): s3_server.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@pytest.mark.integration
def test_a_bucket_gives_the_shards_that_the_same_folder_gives(bucket, shard_dir, tmp_path, capsys):
    options = ["--shard-mb", str(SHARD_BYTES / 2**20), "--processes", "1"]
    assert main(["shards", "write", f"s3://{bucket}/a #1", str(tmp_path / "out"), *options]) == 0
    assert tree(tmp_path / "out") == tree(shard_dir)
    assert capsys.readouterr().out.endswith("Passed over: 1 .txt, 1 hidden files, 1 hidden folders\n")
    assert main(["shards", "write", f"s3://{bucket}/a #1/", str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out.startswith("already complete: 50 images in ")


def test_lists_and_shares_choose_of_a_bucket_as_of_a_folder(bucket, images, tmp_path):
    (tmp_path / "list.txt").write_text("p01\nmore/p05.jpeg\np02.jpg\n")
    for selection in (Selection(fraction=0.3, seed=4), Selection(list_file=tmp_path / "list.txt", first=0.7)):
        chosen = [selection.of(open_source(place).images()) for place in (f"s3://{bucket}/a #1", images)]
        assert chosen[0] == chosen[1]
        assert chosen[0]


def test_an_import_from_a_bucket_that_was_interrupted_goes_on_with_the_same_plan(bucket, shard_dir, tmp_path):
    def stop(done: int, total: int) -> None:
        if done > 10:
            raise KeyboardInterrupt

    source, out = f"s3://{bucket}/a #1", str(tmp_path / "out")
    with pytest.raises(Stopped):
        importer.write(source, out, shard_bytes=SHARD_BYTES, progress=stop)
    seen = []
    assert importer.write(source, out, shard_bytes=SHARD_BYTES, progress=lambda done, total: seen.append(done)) == NUM_IMAGES
    assert seen[0] > 10
    assert tree(tmp_path / "out") == tree(shard_dir)


def packed(paths: list[Path]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for path in paths:
            archive.add(path, path.name)
    return content.getvalue()


def test_tars_of_a_bucket_are_read_in_place(s3_server, images, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_AHEAD", 10_000)  # so that a tar is many requests
    name, paths = s3_server.bucket("tars"), sorted(images.glob("*.jpg"))
    for number in range(2):
        content = packed(paths[number * 20 : number * 20 + 20])
        s3_server.client.put_object(Bucket=name, Key=f"wds/{number:03}.tar", Body=content)
        (tmp_path / "wds").mkdir(exist_ok=True)
        (tmp_path / "wds" / f"{number:03}.tar").write_bytes(content)
    monkeypatch.setattr(BucketFiles, "block_bytes", 9_000)  # some images lie across two or more
    assert importer.write(f"s3://{name}/wds", str(tmp_path / "remote")) == 40
    assert importer.write(tmp_path / "wds", str(tmp_path / "local")) == 40
    assert tree(tmp_path / "remote") == tree(tmp_path / "local")
    single = open_source(f"s3://{name}/wds/001.tar")
    assert [image.key for image in single.images()] == [f"001/{path.name}" for path in paths[20:40]]
    assert single.location == f"s3://{name}/wds/001.tar"


def test_small_members_of_a_tar_are_listed_by_few_requests_and_large_ones_by_little_reading(s3_server, monkeypatch):
    monkeypatch.setattr(files, "_AHEAD", 10_240)
    name = s3_server.bucket("listed")
    asked: list[int] = []
    read = BucketFiles.read
    monkeypatch.setattr(
        BucketFiles, "read", lambda self, n, at=0, size=None: asked.append(size or 0) or read(self, n, at, size)
    )
    for key, num_bytes, count in (("small.tar", 1000, 1000), ("large.tar", 500_000, 4)):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for number in range(count):
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = num_bytes
                archive.addfile(member, io.BytesIO(bytes(num_bytes)))
        s3_server.client.put_object(Bucket=name, Key=key, Body=content.getvalue())
        asked.clear()
        assert len(open_source(f"s3://{name}/{key}").images()) == count
        if key == "small.tar":
            assert len(asked) < len(content.getvalue()) / 10_240 / 5
        else:
            assert sum(asked) < 200_000


def test_a_listing_tells_how_far_it_is(s3_server, images, monkeypatch):
    """A bucket of tars was listed for minutes without a word."""
    name, paths = s3_server.bucket("output"), sorted(images.glob("*.jpg"))
    for number in range(2):
        s3_server.client.put_object(Bucket=name, Key=f"{number}.tar", Body=packed(paths[number * 20 : number * 20 + 20]))
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(files, "_AHEAD", 1024)
    lines: list[str] = []
    read, asked = BucketFiles.read, []

    def slow(self: BucketFiles, *of: Any) -> bytes:
        asked.append(of)
        until = time.monotonic() + 30
        while len(asked) > 12 and not any("so far" in line for line in lines) and time.monotonic() < until:
            time.sleep(0.01)
        return read(self, *of)

    monkeypatch.setattr(BucketFiles, "read", slow)
    assert len(open_source(f"s3://{name}").images(lines.append)) == 40
    assert lines[0] == f"listing s3://{name}"
    assert re.fullmatch(rf"listing s3://{name}: \d+ images so far in 2 tars or the like", lines[-1])


def test_members_of_a_tar_that_lie_side_by_side_are_one_request(s3_server, images, monkeypatch):
    name, paths = s3_server.bucket("tars"), sorted(images.glob("*.jpg"))[:30]
    s3_server.client.put_object(Bucket=name, Key="w.tar", Body=packed(paths))
    source = open_source(f"s3://{name}")
    listed, asked, read = source.images(), [], BucketFiles.read
    monkeypatch.setattr(BucketFiles, "read", lambda self, *place: asked.append(place) or read(self, *place))
    assert [source.read(image) for image in listed] == [path.read_bytes() for path in paths]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("s3://no-such-bucket/x", "the bucket does not exist"),
        ("s3://crops/nothing", "s3://crops/nothing holds none"),
        ("s3://crops/a #1/note.txt", "note.txt is a file of another kind"),
        ("s3://crops/lup", "an LMDB is read on a disk only. Copy s3://crops/lup/data.mdb to a directory first"),
        ("s3://crops/x.tgz", "Decompress s3://crops/x.tgz first"),
        ("gs://crops/a", "in a store that cannot be listed"),
        ("s3://", "a location like s3://bucket/prefix is required"),
    ],
)
def test_a_place_that_is_no_source_is_refused_in_one_line(bucket, s3_server, tmp_path, place, expected):
    for key in ("lup/data.mdb", "x.tgz"):
        s3_server.client.put_object(Bucket=bucket, Key=key, Body=b"x")
    with pytest.raises(UserError) as caught:
        importer.write(place, str(tmp_path / "out"))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_has_gone_is_rejected_and_a_fault_that_passes_is_not(bucket, s3_server, tmp_path, monkeypatch):
    left, read = [2], BucketFiles.read

    def fail(self, name, *place):
        if name == "p01.jpg" and left[0]:
            left[0] -= 1
            with self._failing_as_a_disk(name):
                raise EndpointConnectionError(endpoint_url="http://x")
        if name == "p02.jpg":
            s3_server.client.delete_object(Bucket=bucket, Key="a #1/p02.jpg")
        return read(self, name, *place)

    monkeypatch.setattr(BucketFiles, "read", fail)
    monkeypatch.setattr("personmae.system.retry.time.sleep", lambda seconds: None)
    assert importer.write(f"s3://{bucket}/a #1", str(tmp_path / "out")) == NUM_IMAGES - 1
    (line,) = (tmp_path / "out" / importer.REJECTS).read_text().splitlines()
    assert json.loads(line)["key"] == "p02.jpg"
    assert "no longer in the bucket" in line
    assert left == [0]


def test_credentials_for_the_images_alone_are_enough(bucket, shard_dir, tmp_path, capsys):
    """Who may read one prefix is refused what lies beside it, and mostly also what is not there at all."""
    refused = []

    def refuse(request, **_) -> AWSResponse | None:
        if not request.url.endswith("synthetic.json"):
            return None
        refused.append(request.url)
        body = io.BytesIO(b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        return AWSResponse(request.url, 403, {}, HTTPResponse(body=body, preload_content=False))

    events = storage.s3_client().meta.events
    events.register("before-send.s3.GetObject", refuse)
    try:
        code = main(["shards", "write", f"s3://{bucket}/a #1", str(tmp_path / "out"), "--shard-mb", str(SHARD_BYTES / 2**20)])
    finally:
        events.unregister("before-send.s3.GetObject", refuse)
    assert (code, len(refused)) == (0, 2)
    assert "images written to" in capsys.readouterr().out
    assert tree(tmp_path / "out") == tree(shard_dir)


# --- parts ---


def part(source, destination, number: int, count: int, **options) -> importer.Outcome:
    return importer.carry_out(source, str(destination), shard_bytes=SHARD_BYTES, part=Part(number, count), **options)


def test_parts_are_all_shards_once():
    for num_shards in (0, 1, 5, 12):
        for count in (1, 2, 3, 7):
            numbers = [number for i in range(count) for number in Part(i + 1, count).of(num_shards)]
            assert numbers == list(range(num_shards))


def test_parts_one_after_another_give_the_set_of_one_host(images, shard_dir, tmp_path):
    out = tmp_path / "out"
    first, last = part(images, out, 1, 3), part(images, out, 3, 3)
    assert (first.finished, last.finished) == (False, False)
    assert first.num_missing > last.num_missing > 0
    assert not out.exists()
    assert not list(tmp_path.glob("out.partial/index.json"))
    assert part(images, out, 1, 3) == first.__class__(first.num_images, num_missing=last.num_missing, finished=False)
    assert part(images, out, 2, 3) == importer.Outcome(NUM_IMAGES)
    assert tree(out) == tree(shard_dir)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert part(images, out, 2, 3).was_complete  # a host that comes late


def test_a_part_that_another_host_overtakes_finds_the_import_complete(images, shard_dir, tmp_path, monkeypatch):
    """The other host ends between the look at what is there and the comparison of plans."""
    out, begin = tmp_path / "out", importer._begin
    part(images, out, 1, 2)

    def overtaken(*arguments) -> None:
        shutil.rmtree(tmp_path / "out.partial")
        shutil.copytree(shard_dir, out)
        begin(*arguments)

    monkeypatch.setattr(importer, "_begin", overtaken)
    assert part(images, out, 2, 2) == importer.Outcome(NUM_IMAGES, was_complete=True)
    assert tree(out) == tree(shard_dir)


def test_a_part_that_ends_while_another_host_removes_the_records_misses_nothing(images, shard_dir, tmp_path, monkeypatch):
    part(images, tmp_path / "out", 1, 2)
    partial, looks, records = tmp_path / "out.partial", [], importer._records

    def overtaken(plan, root):
        looks.append(root)
        if len(looks) == 2:  # all is recorded: the other host writes the index and removes the first record
            for name in ("imported.json", "index.json"):
                shutil.copy(shard_dir / name, partial)
            (partial / "import-00000.json").unlink()
        return records(plan, root)

    monkeypatch.setattr(importer, "_records", overtaken)
    assert part(images, tmp_path / "out", 2, 2) == importer.Outcome(NUM_IMAGES, was_complete=True)
    assert len(looks) == 2


def test_the_command_without_a_part_writes_what_is_missing_and_the_index(images, shard_dir, tmp_path):
    part(images, tmp_path / "out", 2, 3)
    assert importer.write(images, str(tmp_path / "out"), shard_bytes=SHARD_BYTES) == NUM_IMAGES
    assert tree(tmp_path / "out") == tree(shard_dir)


@pytest.mark.integration
@pytest.mark.parametrize("store", ["directory", "bucket"])
def test_parts_at_the_same_time_give_the_set_of_one_host(images, shard_dir, s3_server, tmp_path, store):
    """Threads that meet before each end, so that all find everything recorded."""
    name = s3_server.bucket("shared")
    out = str(tmp_path / "out") if store == "directory" else f"s3://{name}/out"
    for _ in range(3):
        ended, faults = [], []
        meet = threading.Barrier(3, timeout=60)

        def work(number: int, ended=ended, faults=faults, meet=meet) -> None:
            def wait(done: int, total: int) -> None:
                if done == total:
                    meet.wait()

            try:
                ended.append(part(images, out, number, 3, progress=wait))
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        assert any(outcome.finished for outcome in ended)
        if store == "directory":
            assert tree(tmp_path / "out") == tree(shard_dir)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
            shutil.rmtree(tmp_path / "out")
        else:
            assert objects(s3_server, name, "out/") == tree(shard_dir)
            for key in s3_server.keys(name):
                s3_server.client.delete_object(Bucket=name, Key=key)


def test_a_part_that_is_at_work_on_this_host_is_not_begun_twice_nor_the_whole(images, tmp_path):
    refusals = []

    def begin_again(done: int, total: int) -> None:
        if refusals:
            return
        for again in (
            lambda: part(images, tmp_path / "out", 1, 2),
            lambda: importer.write(images, str(tmp_path / "out"), shard_bytes=SHARD_BYTES),
        ):
            with pytest.raises(UserError, match="another process is writing") as caught:
                again()
            refusals.append(str(caught.value))

    part(images, tmp_path / "out", 1, 2, progress=begin_again)
    assert refusals[0].startswith("part 1/2: ")
    assert len(refusals) == 2
    part(images, tmp_path / "out", 2, 2)
    assert (tmp_path / "out" / "index.json").exists()


def test_a_part_of_another_plan_is_refused_and_shards_of_another_plan_do_not_count(images, tmp_path):
    out = tmp_path / "out"
    part(images, out, 1, 2)
    with pytest.raises(UserError, match="unfinished import with num_images=50 instead of 25"):
        part(images, out, 2, 2, selection=Selection(fraction=0.5))
    for path in (tmp_path / "out.partial").glob("import-*.json"):  # as of a host that overwrote the plan in the same moment
        path.write_text(json.dumps({**json.loads(path.read_text()), "plan": "another"}))
    assert not part(images, out, 2, 2).finished
    assert part(images, out, 1, 2).finished


def test_an_interrupted_part_leaves_what_others_have_begun(images, tmp_path):
    part(images, tmp_path / "out", 1, 2)
    left = set(os.listdir(tmp_path / "out.partial"))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Stopped):
        part(images, tmp_path / "out", 2, 2, progress=stop)
    assert left <= set(os.listdir(tmp_path / "out.partial"))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", ""])
def test_a_part_that_is_none_is_refused(images, tmp_path, capsys, text):
    with pytest.raises(SystemExit, match="78"):
        main(["shards", "write", str(images), str(tmp_path / "out"), "--part", text])
    assert f"must be I/N with I from 1 to N, got {text!r}" in capsys.readouterr().err


def test_the_command_says_what_is_missing_and_what_comes_next(images, tmp_path, capsys):
    command = ["shards", "write", str(images), str(tmp_path / "out"), "--processes", "1", "--shard-mb", "0.02"]
    assert main([*command, "--part", "1/2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("part 1/2: ")
    assert "shards of other parts are missing" in out
    assert main([*command, "--part", "2/2"]) == 0
    assert capsys.readouterr().out == f"50 images written to {tmp_path}/out\n"
