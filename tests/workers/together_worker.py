"""Stages that ranks pass together or not at all, on every rank of a process group (forked.call)."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch.distributed as torch_dist

from fastdistil.run import ranks as of_ranks
from fastdistil.run.config import Config, EngineConfig, OptimConfig
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


def other_commands(ranks: Ranks) -> dict[str, str]:
    """{what differs here from rank 0: how that ended}."""
    command = replace(Config(), seed=1)
    elsewhere = replace(command, out=Path(f"run-{ranks.rank}"), engine=EngineConfig(threads=1 + ranks.rank))
    lr = replace(command, optim=OptimConfig(lr=1e-3)) if ranks.rank else command
    found = {}
    for what, config, code in (
        ("nothing", command, "same"),
        ("places and threads", elsewhere, "same"),
        ("an option", lr, "same"),
        ("code", command, f"code of rank {ranks.rank}"),
    ):
        with patch.object(of_ranks, "_code_digest", return_value=code):
            try:
                ranks.require_one_command(config)
                found[what] = "passed"
            except ValueError as error:
                found[what] = str(error)
    return found


def other_files(ranks: Ranks) -> str:
    """What is said where ranks have read other teachers."""
    try:
        require_same(ranks, {"data.shards": "same", "teacher.path": str(ranks.rank) * 64, f"of {ranks.rank}": "alone"})
    except ValueError as error:
        return str(error)
    return "nothing"
