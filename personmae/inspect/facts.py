"""Facts about this machine: system, processor, memory, disk, GPUs, versions, and the object store."""

import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from personmae import precision

PACKAGES = (
    "personmae",
    "torch",
    "torchvision",
    "deepspeed",
    "timm",
    "mosaicml-streaming",
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")


def machine() -> dict[str, str]:
    """System, processor, memory and disk, in words."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = cpu_flags()
    disk, shm = shutil.disk_usage(Path.cwd()), Path("/dev/shm")
    return {
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": f"{os.cpu_count()} cores, {usable} usable here, {', '.join(flags) or 'no vector instructions known'}",
        "memory": memory(),
        "disk here": f"{gib(disk.free)} free of {gib(disk.total)} ({Path.cwd()})",
        "/dev/shm": gib(shutil.disk_usage(shm).total) if shm.is_dir() else "none",
    }


def cpu_flags() -> list[str]:
    """The vector instructions that matter here, where the system lists them."""
    known = precision.cpu_flags() or frozenset()
    return [flag for flag in CPU_FLAGS if flag in known]


def memory() -> str:
    """Total and available memory, and a container's limit where there is one."""
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    text = f"{gib(kib['MemAvailable'] << 10)} available of {gib(kib['MemTotal'] << 10)}"
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return text if allowed == "max" else f"{text}, of which this container may use {gib(int(allowed))}"


def devices() -> dict[str, str]:
    """The GPUs by NVML, or what their absence means."""
    try:
        import pynvml
    except ImportError as error:
        return {"GPU": f"unknown: {error}. Install nvidia-ml-py"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"GPU": f"no GPU ({error}): everything runs on the CPU, {precision.native_cpu().why}"}
    driver = pynvml.nvmlSystemGetDriverVersion()
    found = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        used = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
        found[f"GPU {index}"] = f"{name}, {gib(int(used.free))} free of {gib(int(used.total))}, driver {driver}"
    pynvml.nvmlShutdown()
    return found or {"GPU": "no GPU, though there is a driver: everything runs on the CPU"}


def versions() -> dict[str, str]:
    """Installed versions, without importing anything."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def object_store() -> dict[str, str]:
    """Where boto3 finds credentials, and which server it would use."""
    import boto3
    from botocore.exceptions import BotoCoreError

    from personmae.system.storage import s3_client

    try:
        credentials = boto3.Session().get_credentials()
        found = f"found ({credentials.method})" if credentials else "none: s3:// locations cannot be read"
    except BotoCoreError as error:
        found = f"none: {error}"
    try:
        endpoint = without_secrets(s3_client().meta.endpoint_url)
    except (BotoCoreError, ValueError) as error:  # ValueError: no valid address
        endpoint = f"unusable: {error}"
    return {"credentials": found, "endpoint": endpoint}


def without_secrets(text: str) -> str:
    """A text without the user and password that addresses in it may hold."""
    return re.sub(r"://[^/@\s]+@", "://", text)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"
