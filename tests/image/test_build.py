"""The image built from a base made on the spot, and run as a strict pod runs it: user 10001, no capability, a read-only root.

It downloads 3 GB, needs 30 GB of disk and ten to twenty minutes, so only ``make image-test`` asks for it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READ_ONLY = ROOT / "tests/image/read_only.sh"
APT = [Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")]
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
FREE_BYTES = 30e9
PRETRAIN = ["personmae", "pretrain", "configs/quickstart.yaml", "data.shards=/mnt/shards", "train.global_batch_size=16"]
PRETRAIN += ["train.log_every=1", "engine.name=deepspeed", "data.shuffle_block_size=32"]


def refusal() -> str:
    """Why the image is not built here, if it is not."""
    if os.environ.get("PERSONMAE_IMAGE_TEST") != "1":
        return "only 'make image-test' builds the image"
    missing = [name for name in ("buildah", "mmdebstrap", "unshare", "setpriv") if not shutil.which(name)]
    if missing or os.getuid() or not any(file.exists() for file in APT):
        return f"root on Debian is required, and {', '.join(missing) or 'its list of sources'}"
    free = shutil.disk_usage("/var/tmp").free
    return f"{FREE_BYTES / 1e9:.0f} GB are required in /var/tmp, {free / 1e9:.0f} are free" if free < FREE_BYTES else ""


pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(refusal()), reason=refusal()),
]


@dataclass
class Image:
    """An unpacked image, what its configuration says, and a folder that its containers have as /mnt."""

    root: Path
    config: dict
    volume: Path

    def start(self, *command: str) -> subprocess.Popen[str]:
        """A command below the image's own first process."""
        entrypoint = self.config["Entrypoint"][:2]
        line = [READ_ONLY, self.root, self.volume, "OMP_NUM_THREADS=1", *entrypoint, *command]
        return subprocess.Popen([*map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *command: str) -> str:
        """Output of a command that must succeed."""
        process = self.start(*command)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        return output


@pytest.fixture(scope="session")
def buildah() -> Iterator[dict[str, str]]:
    """The environment of a buildah with storage of its own, which is removed in the end."""
    store = Path("/var/tmp") / f"personmae-image-{os.getpid()}"
    store.mkdir()
    (store / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{store}/graph"\nrunroot = "{store}/run"\n'
    )
    ours = {"CONTAINERS_STORAGE_CONF": f"{store}/storage.conf", "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(store)}
    yield os.environ | ours
    subprocess.run(["buildah", "rm", "--all"], env=os.environ | ours, check=False, capture_output=True)
    shutil.rmtree(store)


@pytest.fixture(scope="session")
def base(buildah: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Debian with Python, from the packages that this machine's own apt reads: no container registry is needed."""
    folder = tmp_path_factory.mktemp("base")
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    packages = "--include=python3,python3-venv,python3-dev,ca-certificates"
    sources = next(file for file in APT if file.exists())
    command = ["mmdebstrap", "--variant=minbase", packages, release["VERSION_CODENAME"], folder / "base.tar", sources]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    (folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    subprocess.run(["buildah", "build", "--tag", "localhost/base", str(folder)], env=buildah, check=True, capture_output=True)
    (folder / "base.tar").unlink()
    return "localhost/base"


@pytest.fixture(scope="session")
def image(buildah: dict[str, str], base: str, shard_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """``make image``, unpacked, with the shards of the tests in its volume."""
    flags = f"--pull-never --build-arg BASE_IMAGE={base}"
    if CERTIFICATES.exists():  # of a proxy, perhaps
        flags += f" --volume {CERTIFICATES.parent}:{CERTIFICATES.parent}:ro --build-arg PIP_CERT={CERTIFICATES}"
    begun = time.monotonic()
    make = ["make", "image", "ENGINE=buildah", "IMAGE=localhost/personmae", f"IMAGE_FLAGS={flags}"]
    built = subprocess.run(make, cwd=ROOT, env=buildah, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    seconds = time.monotonic() - begun

    def ask(*args: str) -> str:
        return subprocess.run(["buildah", *args], env=buildah, check=True, capture_output=True, text=True).stdout.strip()

    size = json.loads(ask("images", "--json", "localhost/personmae"))[0]["size"]
    print(f"\nimage: {size}, built in {seconds:.0f} s")
    config = json.loads(ask("inspect", "--type", "image", "localhost/personmae"))["OCIv1"]["config"]
    volume = tmp_path_factory.mktemp("volume")
    for folder in (volume, *volume.parents[:2]):
        folder.chmod(0o777 if folder == volume else 0o755)
    shutil.copytree(shard_dir, volume / "shards")
    root = Path(ask("mount", ask("from", "--pull-never", "localhost/personmae")))
    root.with_suffix(".env").write_text("\n".join(config["Env"]) + "\n")
    return Image(root, config, volume)


def test_nobody_can_write_but_to_the_volumes(image: Image) -> None:
    assert image.config["User"] == "10001:10001"
    printed = image.run(
        "sh", "-c", "id -u; for each in / /opt/personmae /opt/venv /mnt /tmp; do test -w $each && echo $each; done; true"
    )
    assert printed.split() == ["10001", "/mnt", "/tmp"]


def test_the_image_says_what_it_is(image: Image) -> None:
    labels = {name.rpartition(".")[2]: text for name, text in image.config["Labels"].items() if "opencontainers" in name}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert labels["revision"] == head
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])
    assert not (image.root / "opt/personmae/tests").exists()


def test_doctor_finds_that_everything_works(image: Image) -> None:
    printed = image.run("sh", "-c", "cd /mnt && personmae doctor --shards /mnt/shards")
    assert "torch.compile" in printed
    assert "fails" not in printed, printed


def test_five_steps_are_trained(image: Image) -> None:
    printed = image.run(*PRETRAIN, "run_dir=/mnt/run", "train.total_steps=5")
    assert "pretrain 5/5" in printed
    assert len((image.volume / "run/metrics.jsonl").read_text().splitlines()) == 5


def test_a_signal_to_the_first_process_stops_the_run_with_its_state_saved(image: Image) -> None:
    process = image.start(*PRETRAIN, "run_dir=/mnt/long", "train.total_steps=100000")
    metrics = image.volume / "long/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert Path(f"/proc/{first}/comm").read_text().strip() == "tini"
    os.kill(int(first), signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert list((image.volume / "long/checkpoints").glob("step*"))
