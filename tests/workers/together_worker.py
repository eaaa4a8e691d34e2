"""Stages that ranks pass together or not at all, on every rank of a process group (forked.call)."""

from unittest.mock import patch

import torch.distributed as torch_dist

from fastdistil.run.ranks import Ranks
from fastdistil.training.inputs import require_same

STAGES = {"nobody": (), "rank 1": (1,), "both": (0, 1)}
"""Which ranks refuse."""


def refusals(ranks: Ranks) -> dict[str, str]:
    """{stage: how it ended here, and whether the process group was left}; it stays, for there are several stages."""
    found = {}
    for stage, refusing in STAGES.items():
        with patch.object(torch_dist, "destroy_process_group") as left:
            try:
                with ranks.together():
                    if ranks.rank in refusing:
                        raise OSError(f"no space on rank {ranks.rank}")
                found[stage] = "passed"
            except (ValueError, OSError) as error:
                found[stage] = f"{type(error).__name__}: {error}"
        found[stage] += "; left" * left.call_count
    return found


def other_files(ranks: Ranks) -> str:
    """What is said where ranks have read other teachers."""
    try:
        require_same(ranks, {"data.shards": "same", "teacher.path": str(ranks.rank) * 64, f"of {ranks.rank}": "alone"})
    except ValueError as error:
        return str(error)
    return "nothing"
