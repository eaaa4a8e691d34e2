"""The processes of a run, found by their command lines: Linux alone."""

import subprocess
from pathlib import Path


def processes_of(run: Path) -> list[int]:
    """Living processes whose command line names the run folder."""
    found = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split() if not _is_zombie(int(pid))]


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:  # it has just ended
        return True


def workers_of(run: Path) -> dict[int, int]:
    """{rank: process} of a run under torchrun."""
    found = {}
    for pid in processes_of(run):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [int(word[5:]) for word in environment if word.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = pid
    return found
