"""The time of a model alone: which calls are counted, and on what they ran."""

import itertools

import pytest
import torch

from personmae.monitor import environment
from personmae.reid import latency

IMG_SIZE = (32, 16)


def test_the_median_of_calls_after_the_warm_up_is_recorded_with_the_hardware() -> None:
    """The clock stands still but while the model works: 10 ms an image. Some calls take ten times that."""
    now, calls = 0.0, itertools.count()
    seen: list[tuple[int, ...]] = []

    def features(images: torch.Tensor) -> torch.Tensor:
        nonlocal now
        assert not torch.is_grad_enabled()
        seen.append(tuple(images.shape))
        now += 0.01 * len(images) * (10 if next(calls) % 10 in (0, 5) else 1)
        return images.flatten(1)

    record = latency.measure(features, img_size=IMG_SIZE, device=torch.device("cpu"), clock=lambda: now)
    assert record["milliseconds"] == pytest.approx(10.0)
    assert record["images_per_second"] == pytest.approx(100.0)
    series = latency.WARM_UPS + latency.ROUNDS
    assert seen == [(1, 3, *IMG_SIZE)] * series + [(latency.BATCH_SIZE, 3, *IMG_SIZE)] * series
    assert record["hardware"] == environment.describe_hardware()
    assert (record["device"], record["threads"], record["precision"]) == ("cpu", torch.get_num_threads(), "fp32")
    threads = torch.get_num_threads()
    assert latency.in_words(record) == f"10.0 ms an image, 100 images/s in batches of 32 (fp32, cpu, {threads} threads)"


def test_warm_ups_are_not_counted() -> None:
    now, calls = 0.0, itertools.count()

    def features(images: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 60.0 if next(calls) % (latency.WARM_UPS + latency.ROUNDS) < latency.WARM_UPS else 0.5
        return images.flatten(1)

    record = latency.measure(features, img_size=IMG_SIZE, device=torch.device("cpu"), clock=lambda: now)
    assert record["milliseconds"] == pytest.approx(500.0)
    assert record["images_per_second"] == pytest.approx(latency.BATCH_SIZE / 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_named_and_waited_for() -> None:
    weights = torch.rand(3 * 32 * 16, 4096, device="cuda")
    record = latency.measure(lambda images: images.flatten(1) @ weights, img_size=IMG_SIZE, device=torch.device("cuda"))
    assert record["device"] == torch.cuda.get_device_name()
    assert 0 < record["milliseconds"] < 1000
