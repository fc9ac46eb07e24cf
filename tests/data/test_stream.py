"""Reading shards: samples byte for byte, faults by name, and batches in the global order whatever reads them."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from personmae.data import order, stream
from personmae.data.decode import decode_onto
from personmae.data.shard_set import ShardSet
from personmae.data.stream import BatchReader, CanvasBatch
from personmae.errors import UserError

NUM_IMAGES = 50
CANVAS = (40, 20)
OPTIONS: dict[str, Any] = {
    "canvas_size": CANVAS,
    "seed": 3,
    "global_batch_size": 8,
    "rank": 0,
    "world_size": 1,
    "micro_batch_size": 4,
    "first_step": 0,
    "num_threads": 2,
    "prefetch_batches": 2,
    "block_size": 16,
    "max_bad_ratio": 0.1,
}


@pytest.fixture
def data(shard_dir: Path, tmp_path: Path) -> Iterator[ShardSet]:
    with ShardSet(str(shard_dir), tmp_path) as shards:
        yield shards


@pytest.fixture
def own_shards(shard_dir: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(shard_dir, tmp_path / "own"))


@contextmanager
def reading(data: ShardSet, **options) -> Iterator[BatchReader]:
    reader = BatchReader(data, **(OPTIONS | options))
    try:
        yield reader
    finally:
        reader.close()


def read(data: ShardSet, count: int, **options) -> list[CanvasBatch]:
    with reading(data, **options) as reader:
        return [kept(batch) for batch in islice(reader, count)]


def kept(batch: CanvasBatch) -> CanvasBatch:
    """A copy that the reader does not overwrite, black where there is no image."""
    copy = CanvasBatch(*(tensor.clone() for tensor in batch))
    for canvas, (height, width) in zip(copy.canvas, copy.size.tolist(), strict=True):
        canvas[height:], canvas[:, width:] = 0, 0
    return copy


def joined(batches: list[CanvasBatch]) -> CanvasBatch:
    return CanvasBatch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def same(a: CanvasBatch, b: CanvasBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def opening(root: Path, cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        ShardSet(str(root), cache)
    return str(caught.value)


# --- shards ---


def test_samples_are_the_files_byte_for_byte_with_their_names_and_sizes(data, images):
    files = sorted(path for path in images.rglob("*") if path.is_file())
    assert len(data) == len(files) == NUM_IMAGES
    number = 0
    for index, shard in enumerate(data.shards):
        for position in range(shard.samples):
            sample, file = data.open(index).sample(position), files[number]
            assert bytes(sample["jpeg"]) == bytes(data.jpeg(number)) == file.read_bytes()
            assert bytes(sample["key"]).decode() == file.relative_to(images).as_posix()
            height, width = (int(np.frombuffer(sample[side], np.uint16)[0]) for side in ("height", "width"))
            assert (height, width) == decode_onto(sample["jpeg"], np.empty((8, 8, 3), np.uint8)).native_size
            assert data.where(number) == f"sample {position} of {data.root}/{shard.name}"
            number += 1


STREAMING = """
import hashlib, json, sys, warnings
warnings.simplefilter("ignore")
from personmae.system import mosaic
dataset = mosaic.load("streaming.base.dataset").StreamingDataset(local=sys.argv[1], shuffle=False, batch_size=1)
samples = [[s["key"], hashlib.sha256(s["jpeg"]).hexdigest(), int(s["height"]), int(s["width"])] for s in dataset]
print(json.dumps(samples))
"""


@pytest.mark.integration
def test_mosaicml_streaming_opens_the_same_directory_and_reads_the_same_samples(data, own_shards):
    done = subprocess.run([sys.executable, "-c", STREAMING, str(own_shards)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ours = []
    for index, shard in enumerate(data.shards):
        for position in range(shard.samples):
            sample = data.open(index).sample(position)
            sizes = [int(np.frombuffer(sample[side], np.uint16)[0]) for side in ("height", "width")]
            ours.append([bytes(sample["key"]).decode(), hashlib.sha256(sample["jpeg"]).hexdigest(), *sizes])
    assert json.loads(done.stdout.splitlines()[-1]) == ours


def test_a_missing_directory_is_named(tmp_path):
    assert f"{tmp_path}/nowhere does not exist" in opening(tmp_path / "nowhere", tmp_path)


def test_a_directory_without_an_index_says_how_to_write_one(tmp_path):
    assert "index.json is required" in opening(tmp_path, tmp_path)
    assert "personmae shards write" in opening(tmp_path, tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"shards": [{"format": "mds"}]}', '{"shards": 3}'])
def test_an_index_that_is_not_one_is_named(own_shards, tmp_path, content):
    (own_shards / "index.json").write_text(content)
    assert f"{own_shards}/index.json must be an MDS index with a jpeg column" in opening(own_shards, tmp_path)


def test_compressed_shards_and_shards_without_a_jpeg_column_are_refused(own_shards, tmp_path):
    index = json.loads((own_shards / "index.json").read_text())
    way_on = f"import them with 'personmae shards write {own_shards} OUT'"
    for change, expected in (
        ({"compression": "zstd"}, f"These have the compression zstd: {way_on}"),
        ({"column_names": ["image", "key", "height", "width"]}, "These have the columns image ("),
        ({"column_encodings": ["uint16", "pil", "str", "uint16"]}, way_on),
        ({"format": "json"}, "shards of the format 'mds' are required"),
    ):
        changed = {"shards": [entry | change for entry in index["shards"]]}
        (own_shards / "index.json").write_text(json.dumps(changed))
        assert expected in opening(own_shards, tmp_path)


def test_a_truncated_shard_is_named_with_both_sizes(own_shards, tmp_path):
    path = own_shards / "shard.00002.mds"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    message = opening(own_shards, tmp_path)
    assert f"shard {own_shards}/shard.00002.mds must have {size} bytes and is {size - 1} bytes" in message


def test_a_missing_shard_is_named(own_shards, tmp_path):
    (own_shards / "shard.00001.mds").unlink()
    message = opening(own_shards, tmp_path)
    assert f"shard {own_shards}/shard.00001.mds must have" in message
    assert "is missing" in message


def test_a_hash_that_does_not_agree_names_the_shard(own_shards, tmp_path):
    path = own_shards / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with ShardSet(str(own_shards), tmp_path) as data:
        data.open(1)
        with pytest.raises(UserError, match=r"own/shard\.00000\.mds does not have the size and hash its index gives"):
            data.open(0)


# --- batches ---


def test_batches_hold_the_decoded_images_of_the_global_order_with_their_keys(data):
    ids = order.epoch_order(data.sizes, seed=3, epoch=0, block_size=16).ids
    batch = joined(read(data, 12))
    assert [tuple(t.shape) for t in batch] == [(48, *CANVAS, 3), (48, 2), (48, 2), (48,)]
    assert torch.equal(batch.keys, torch.from_numpy(order.sample_keys(ids[:48], seed=3, epoch=0)))
    for row, sample_id in enumerate(ids[:48]):
        canvas = np.zeros((*CANVAS, 3), np.uint8)
        native, size = decode_onto(data.jpeg(int(sample_id)), canvas)
        assert np.array_equal(batch.canvas[row].numpy(), canvas)
        assert (batch.native_size[row].tolist(), batch.size[row].tolist()) == (list(native), list(size))


@pytest.mark.parametrize("first_step", [1, 5, 6, 13])
def test_resuming_at_a_step_reads_what_an_uninterrupted_run_reads(data, first_step):
    whole = read(data, 2 * 16)
    resumed = read(data, 2 * (16 - first_step), first_step=first_step)
    for a, b in zip(whole[2 * first_step :], resumed, strict=True):
        assert same(a, b)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_what_one_rank_reads(data, world_size):
    alone = read(data, 2 * 8)
    per_rank = [read(data, 8, rank=rank, world_size=world_size, micro_batch_size=8 // world_size) for rank in range(world_size)]
    for step in range(8):
        together = joined([batches[step] for batches in per_rank])
        assert same(together, joined(alone[2 * step : 2 * step + 2]))


@pytest.mark.parametrize(("num_threads", "prefetch_batches"), [(1, 1), (3, 4), (8, 2)])
def test_the_number_of_threads_and_the_reading_ahead_do_not_matter(data, num_threads, prefetch_batches):
    expected = read(data, 14)
    got = read(data, 14, num_threads=num_threads, prefetch_batches=prefetch_batches)
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_the_micro_batch_size_only_cuts_the_batch_differently(data, micro_batch_size):
    count = 3 * 8 // micro_batch_size
    assert same(joined(read(data, count, micro_batch_size=micro_batch_size)), joined(read(data, 6)))


def test_epochs_follow_each_other_in_other_orders_and_with_other_keys(data):
    with reading(data, micro_batch_size=8) as reader:
        assert reader.steps_per_epoch == 6
        keys = [batch.keys.clone() for batch in islice(reader, 18)]
    epochs = [torch.cat(keys[i : i + 6]) for i in (0, 6, 12)]
    for epoch, found in enumerate(epochs):
        ids = order.epoch_order(data.sizes, seed=3, epoch=epoch, block_size=16).ids[:48]
        assert torch.equal(found, torch.from_numpy(order.sample_keys(ids, seed=3, epoch=epoch)))
    assert len(torch.cat(epochs).unique()) == 3 * 48


@pytest.mark.parametrize("total_steps", [1, 4, 6, 9, 12])
def test_a_run_of_so_many_steps_ends_after_them_and_opens_no_shard_beyond(data, total_steps):
    options = {"micro_batch_size": 8, "first_step": 0, "total_steps": total_steps}
    expected = read(data, total_steps, micro_batch_size=8)
    before = data.counters.totals().get("personmae_stream_bytes_total{source=cache}", 0)
    with reading(data, **options) as reader:
        found = [kept(batch) for batch in reader]
        with pytest.raises(StopIteration):
            next(reader)
    assert len(found) == total_steps
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    needed, epoch = 0, 0
    while total_steps > 0:
        made = order.epoch_order(data.sizes, seed=3, epoch=epoch, block_size=16)
        last = min(total_steps, 6) * 8 if total_steps <= 6 else len(made.ids)
        needed += sum(data.shards[i].num_bytes for i, start in zip(made.shards, made.starts, strict=True) if start < last)
        total_steps, epoch = total_steps - 6, epoch + 1
    opened = data.counters.totals()["personmae_stream_bytes_total{source=cache}"] - before
    assert opened == needed


def test_too_few_samples_for_a_global_batch_are_refused_at_once(data):
    before = threading.active_count()
    with pytest.raises(UserError, match=f"one global batch needs 51 samples. .* holds {NUM_IMAGES}"):
        BatchReader(data, **{**OPTIONS, "global_batch_size": 51})
    assert threading.active_count() == before


def spoil(root: Path, shard: int, position: int, cache: Path) -> int:
    """Overwrite a JPEG with zeros; returns its number."""
    with ShardSet(str(root), cache) as data:
        jpeg = bytes(data.open(shard).sample(position)["jpeg"])
        number = sum(data.sizes[:shard]) + position
    path = root / f"shard.{shard:05}.mds"
    path.write_bytes(path.read_bytes().replace(jpeg, bytes(len(jpeg))))
    index = json.loads((root / "index.json").read_text())  # the shard was written so, it is not damaged
    index["shards"][shard]["raw_data"]["hashes"]["xxh64"] = xxhash.xxh64(path.read_bytes()).hexdigest()
    (root / "index.json").write_text(json.dumps(index))
    return number


def test_a_bad_image_is_named_counted_and_replaced_by_its_successor(data, own_shards, tmp_path):
    bad = spoil(own_shards, 1, 2, tmp_path)
    with ShardSet(str(own_shards), tmp_path) as damaged:
        ids = order.epoch_order(damaged.sizes, seed=3, epoch=0, block_size=16).ids[:48].tolist()
        assert bad in ids  # not in the tail that is dropped
        with reading(damaged) as reader:
            batch = joined([kept(batch) for batch in islice(reader, 12)])
            seen = list(reader.bad_samples)
    assert len({message.split(":")[0] for message in seen}) == 1
    assert seen[0].startswith(f"sample 2 of {own_shards}/shard.00001.mds: ")
    whole = joined(read(data, 12))
    row = ids.index(bad)
    others = [i for i in range(48) if i != row]
    assert torch.equal(batch.canvas[others], whole.canvas[others])
    assert torch.equal(batch.keys, whole.keys)
    canvas = np.zeros((*CANVAS, 3), np.uint8)
    native, _ = decode_onto(data.jpeg(bad + 1), canvas)
    assert np.array_equal(batch.canvas[row].numpy(), canvas)
    assert batch.native_size[row].tolist() == list(native)


def test_the_last_sample_is_replaced_by_the_first(data, own_shards, tmp_path):
    last = len(data.shards) - 1
    bad = spoil(own_shards, last, data.shards[last].samples - 1, tmp_path)
    assert bad == NUM_IMAGES - 1
    ids = order.epoch_order(data.sizes, seed=3, epoch=0, block_size=16).ids.tolist()
    with ShardSet(str(own_shards), tmp_path) as damaged:
        batch = joined(read(damaged, 5, global_batch_size=10, micro_batch_size=10))  # no tail
    expected = np.zeros((*CANVAS, 3), np.uint8)
    decode_onto(data.jpeg(0), expected)
    assert np.array_equal(batch.canvas[ids.index(bad)].numpy(), expected)


def test_bad_images_in_a_row_are_each_counted_once_in_all_epochs(data, own_shards, tmp_path):
    bad = [spoil(own_shards, 1, position, tmp_path) for position in (0, 1, 2)]
    with ShardSet(str(own_shards), tmp_path) as damaged, reading(damaged) as reader:
        for _ in range(3 * 12):
            next(reader)
        assert len(reader.bad_samples) == len(set(reader.bad_samples)) == 3
        assert reader.counters.totals()["personmae_stream_bad_samples_total"] == 3
    ids = order.epoch_order(data.sizes, seed=3, epoch=0, block_size=16).ids[:48].tolist()
    with ShardSet(str(own_shards), tmp_path) as damaged:
        batch = joined(read(damaged, 12))
    successor = np.zeros((*CANVAS, 3), np.uint8)
    decode_onto(data.jpeg(bad[-1] + 1), successor)
    for number in set(bad) & set(ids):
        assert np.array_equal(batch.canvas[ids.index(number)].numpy(), successor)


def test_more_bad_images_than_allowed_stop_the_run_with_one_line(own_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_MIN_SEEN", 10)
    for position in range(6):
        spoil(own_shards, 0, position, tmp_path)
    with ShardSet(str(own_shards), tmp_path) as damaged, reading(damaged, max_bad_ratio=0.01) as reader:
        with pytest.raises(UserError, match=r"at most 1\.0% of the images may be unreadable") as caught:
            list(islice(reader, 12))
        assert f"Run 'personmae shards verify {own_shards}'" in str(caught.value)
        assert "shard.00000.mds" in str(caught.value)


def test_a_few_bad_images_early_on_do_not_stop_a_run(own_shards, tmp_path):
    for position in range(3):
        spoil(own_shards, 0, position, tmp_path)
    with ShardSet(str(own_shards), tmp_path) as damaged, reading(damaged, max_bad_ratio=0.01) as reader:
        assert len(list(islice(reader, 12))) == 12
        assert len({message.split(":")[0] for message in reader.bad_samples}) == 3


def test_closing_ends_every_thread_even_while_reading_ahead(data):
    before = set(threading.enumerate())
    for count in (0, 1, 5):
        reader = BatchReader(data, **OPTIONS)
        list(islice(reader, count))
        assert set(threading.enumerate()) > before
        reader.close()
        assert set(threading.enumerate()) == before


def test_closing_after_an_error_ends_every_thread(own_shards, tmp_path):
    before = set(threading.enumerate())
    for shard in range(2):
        spoil(own_shards, shard, 0, tmp_path)
    with (
        ShardSet(str(own_shards), tmp_path) as damaged,
        reading(damaged, max_bad_ratio=0.0) as reader,
        pytest.raises(UserError),
    ):
        list(islice(reader, 12))
    assert set(threading.enumerate()) == before


def test_slices_stay_readable_when_their_shard_was_let_go(data):
    first = data.jpeg(0)
    content = bytes(first)
    data.open(len(data.shards) - 1)
    data.close()
    assert bytes(first) == content
