"""The processes of a run, found by their command lines: Linux alone."""

import contextlib
import subprocess
from pathlib import Path


def processes_of(run: Path) -> list[int]:
    """Living processes whose command line names the run folder."""
    found = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split() if not is_zombie(int(pid))]


def is_zombie(pid: int) -> bool:
    """Whether it has ended and nobody has asked for its status yet, or is gone altogether."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:  # it has just ended
        return True


def parent_of(pid: int) -> int:
    """The parent of a living process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def workers_of(run: Path) -> dict[int, int]:
    """{rank: process} of a run under torchrun; a rank's data workers have its environment, too, and are left out."""
    ranks = {}
    for pid in processes_of(run):
        with contextlib.suppress(OSError):  # it has just ended
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            for word in environment:
                if word.startswith(b"RANK="):
                    ranks[pid] = int(word[5:])
    return {rank: pid for pid, rank in ranks.items() if parent_of(pid) not in ranks}
