"""What this process holds in memory, as the system tells it."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def memory(field: str) -> int:
    """Bytes that this process holds (VmRSS) or has held at most (VmHWM).

    Where there is no /proc, the most it has held stands for both. (Linux's `ru_maxrss` would not do: it goes on from
    that of the process that started this one.)
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
