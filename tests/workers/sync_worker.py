"""`fastdistil.pretrain` with a count of what would make the host wait for a GPU: sync_worker ARGUMENTS...

Prints, as JSON, how often each line of our code brought a tensor's number to the host on this rank. What an operator
does counts for the line that calls it.
"""

import json
import sys
import traceback
from collections import Counter
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

from fastdistil import pretrain
from fastdistil.run.command import launched, leave

SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}
PACKAGE = Path(pretrain.__file__).parent


def is_ours(path: Path) -> bool:
    """Whether a file is the package's and no operator."""
    return path.is_relative_to(PACKAGE) and path.parent.name != "kernels"


class Syncs(TorchDispatchMode):
    """Counts operators whose result has to be on the host. `tolist` of a CPU tensor asks for its numbers one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.by_line: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in SYNCS:
            *_, frame = (f for f in traceback.extract_stack() if is_ours(Path(f.filename)))
            self.by_line[f"{Path(frame.filename).name}: {frame.line}"] += 1
        return func(*args, **(kwargs or {}))


syncs = Syncs()
with syncs:
    status = pretrain.main(sys.argv[1:])
if launched().rank == 0:
    print("SYNCS " + json.dumps(syncs.by_line))
leave(status)
