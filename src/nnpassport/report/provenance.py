"""Where a number comes from: commit, versions and device, to be kept beside it."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMMIT = "NNPASSPORT_COMMIT"
"""Says which commit runs, where only the files of a checkout were copied."""
_USER = re.compile(r"(?<=://)[^/@\s]*@")


def provenance() -> dict[str, Any]:
    """Commit (None outside a checkout), versions, device and date, as plain JSON values.

    Of torch nothing is said where it was not used: it is not loaded to be asked.
    """
    # Imported here: the package's own __init__ imports what imports this.
    from nnpassport import __version__  # noqa: PLC0415

    torch = sys.modules.get("torch")
    return {
        "commit": _commit(),
        "nnpassport": __version__,
        "torch": None if torch is None else torch.__version__,
        "python": platform.python_version(),
        "device": device_name(),
        "threads": None if torch is None else torch.get_num_threads(),
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def made_with() -> dict[str, Any]:
    """`provenance` and what it takes to repeat a finding: the command, the versions, the time.

    Names of files are in the command, what is in them never; whoever is named in an address is not.
    """
    command = shlex.join(["nnpassport", *sys.argv[1:]])
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "command": _USER.sub("", command),
        **provenance(),
        **{name: version(name) for name in ("numpy", "scipy", "safetensors", "cryptography")},
    }


def device_name() -> str:
    """The accelerator if there is one and torch is used, else the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    if told := os.environ.get(COMMIT):
        return told
    here = Path(__file__).parent
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)  # noqa: S603
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
