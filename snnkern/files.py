"""What is written to disk is there whole or not at all, and says what made it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ._version import __version__

__all__ = ["commit", "replacing", "versions", "write_json"]


def versions() -> dict[str, str]:
    """What a run depends on besides its settings."""
    return {
        "processor": _processor(),
        "snnkern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def commit(folder: Path) -> str | None:
    """Of the checkout that ``folder`` is in, "+" behind it where files differ; None without a checkout or git."""

    def git(*command: str) -> str:
        options = {"capture_output": True, "text": True, "check": True, "cwd": folder}
        return subprocess.run(["git", *command], **options).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


@contextmanager
def replacing(path: Path):
    """A binary file that takes the name ``path`` when it is complete and on disk; until then, what was there stays. A
    failure leaves nothing behind; one of the system's is an OSError that names ``path``. A link is replaced, not
    followed."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        refused = error if isinstance(error, OSError) else error.__context__  # torch.save's error is a RuntimeError
        if isinstance(refused, OSError) and not isinstance(error, KeyboardInterrupt):
            raise OSError(refused.errno, refused.strerror, str(path)) from error
        raise
