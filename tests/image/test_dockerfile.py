"""What can be said of the image without building it; test_build.py builds and runs it."""

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LOCK = (ROOT / "requirements.txt").read_text()
CHECKOV_LOCK = (ROOT / "tests/k8s/checkov.txt").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(text: str) -> list[tuple[str, str]]:
    """Keyword and rest of each instruction of a Dockerfile, continued lines joined."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def values(keyword: str) -> list[str]:
    return [rest for name, rest in instructions(DOCKERFILE) if name == keyword]


def hadolint(text: str) -> str:
    """What hadolint says of a Dockerfile."""
    program = Path(sys.executable).parent / "hadolint"
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False).stdout


def test_hadolint_has_nothing_to_say_but_what_is_excused() -> None:
    assert hadolint(DOCKERFILE) == ""
    without = re.sub(r"# hadolint ignore=.*\n", "", DOCKERFILE)
    assert set(re.findall(r"DL\d+|SC\d+", hadolint(without))) == {"DL3008"}


def test_every_exception_of_hadolint_has_its_reason_above() -> None:
    lines = DOCKERFILE.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("# hadolint ignore="):
            above = "\n".join(lines[max(0, number - 4) : number])
            for code in line.partition("=")[2].split(","):
                assert f"{code}: " in above


def test_all_stages_start_from_one_base_that_is_pinned_by_its_digest() -> None:
    assert {rest.split()[0] for rest in values("FROM")} == {"${BASE_IMAGE}"}
    base = next(rest for rest in values("ARG") if rest.startswith("BASE_IMAGE="))
    assert re.search(r"@sha256:[0-9a-f]{64}$", base)


def test_the_compiler_is_the_only_one_and_can_be_left_out() -> None:
    (packages,) = [rest for rest in values("RUN") if "apt-get" in rest]
    installed = packages.split("--no-install-recommends", 1)[1].split("&&")[0].split()
    assert installed == ["tini", "${COMPILER}", "${PACKAGES}"]
    assert "COMPILER=g++" in values("ARG")


def test_user_folder_and_first_process_are_those_of_the_manifests() -> None:
    assert values("USER") == ["10001:10001"]
    assert values("ENTRYPOINT") == ['["/usr/bin/tini", "--", "personmae"]']
    manifests = "\n".join(file.read_text() for file in (ROOT / "k8s/base").rglob("*.yaml"))
    assert set(re.findall(r"runAs(?:User|Group): (\d+)", manifests)) == {"10001"}
    assert set(re.findall(r"workingDir: (\S+)", manifests)) == set(values("WORKDIR"))
    commands = re.findall(r"command:\s+(?:- |\[)(/\S+?),?\s+(?:- )?(\S+?),?\s", manifests)
    assert set(commands) == {("/usr/bin/tini", "--")}


def test_what_the_manifests_use_of_the_checkout_is_in_the_image() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignore if line.startswith("!")}
    used = {
        found for file in (ROOT / "k8s").rglob("*.yaml") for found in re.findall(r"/opt/personmae/([\w.]+)", file.read_text())
    }
    assert "*" in ignore
    assert used | {"personmae", "launcher", "k8s", "pyproject.toml", "requirements.txt"} <= kept
    assert all((ROOT / name).exists() for name in kept)


def test_the_label_tells_the_version_of_the_project() -> None:
    assert f'org.opencontainers.image.version="{PROJECT["version"]}"' in DOCKERFILE


# --- requirements.txt -----------------------------------------------------------------------------------------------


def locked(lock: str = LOCK) -> dict[str, Requirement]:
    """The pins of a lock by name; each must have a hash, and nothing else may stand there."""
    text = re.sub(r"(?m)^\s*#.*\n", "", lock)
    entries = [entry for entry in re.split(r"(?m)^(?=\S)", text) if entry]
    found = {}
    for entry in entries:
        pin, *hashes = re.split(r"\s*\\\s+", entry.strip())
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), pin
        requirement = Requirement(pin)
        assert str(requirement.specifier).startswith("=="), pin
        found[canonicalize_name(requirement.name)] = requirement
    return found


def test_the_lock_pins_each_requirement_of_the_project_within_its_range() -> None:
    pins = locked()
    tools = PROJECT["optional-dependencies"]["dev"]
    for each in map(Requirement, [*PROJECT["dependencies"], *tools]):
        pin = pins[canonicalize_name(each.name)]
        assert each.specifier.contains(str(pin.specifier).removeprefix("==")), f"{pin} is not {each}: lock again"


def test_the_lock_holds_what_its_packages_require_in_turn() -> None:
    pins = locked()
    compared = 0
    for name, pin in pins.items():
        try:
            here = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform
        if pin.specifier.contains(here.version, prereleases=True):
            for each in map(Requirement, here.requires or []):
                if not each.marker or each.marker.evaluate({"extra": ""}):
                    assert canonicalize_name(each.name) in pins, f"{each} of {name} is missing: lock again"
            compared += 1
    assert compared > len(pins) // 2


@pytest.mark.parametrize("lock", [LOCK, CHECKOV_LOCK])
def test_a_lock_names_no_index_and_the_command_that_writes_it(lock: str) -> None:
    assert "://" not in lock
    assert "index-url" not in lock
    assert lock.splitlines()[1] == "#    make lock"
    assert locked(lock)


def test_commands_and_image_install_by_the_same_lock() -> None:
    (image,) = [rest for rest in values("RUN") if "uv pip install" in rest]
    assert "--constraint /tmp/requirements.txt --build-constraint /tmp/requirements.txt" in image
    assert re.search(r"(?m)^LOCKED := --constraint requirements.txt --build-constraint requirements.txt$", MAKEFILE)
    assert re.search(r"(?m)^\$\(INSTALLED\): pyproject.toml requirements.txt$", MAKEFILE)


def test_uv_refuses_a_wheel_whose_hash_is_not_the_constraints(tmp_path: Path) -> None:
    """What the image and both commands lean on: uv checks the hashes of constraints too."""
    wheel = tmp_path / "lonely-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lonely-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lonely\nVersion: 1.0\n")
        archive.writestr(
            "lonely-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("lonely-1.0.dist-info/RECORD", "")

    def install(digest: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "lock.txt").write_text(f"lonely==1.0 --hash=sha256:{digest}\n")
        uv = [
            Path(sys.executable).parent / "uv",
            "pip",
            "install",
            "--offline",
            "--no-cache",
            "--no-index",
            "--find-links",
            tmp_path,
        ]
        into = ["--python", sys.executable, "--target", tmp_path / "site", "--constraint", tmp_path / "lock.txt", "lonely"]
        return subprocess.run([*map(str, uv + into)], capture_output=True, text=True, check=False)

    refused = install("0" * 64)
    assert refused.returncode != 0
    assert "hash" in refused.stderr.lower()
    assert install(hashlib.sha256(wheel.read_bytes()).hexdigest()).returncode == 0
    assert (tmp_path / "site/lonely-1.0.dist-info").is_dir()
