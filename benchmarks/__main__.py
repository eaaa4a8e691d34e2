"""What there is to be measured: `python -m benchmarks`."""

import ast
from pathlib import Path

from fastdistil.run.command import command, leave

FOLDER = Path(__file__).parent
OPERATORS = (
    *("attention", "cosine", "distill", "dropout", "geglu", "gelu", "layernorm", "linear_distill", "mixture", "rope"),
)


def about(path: Path) -> str:
    """The first sentence of a file's docstring, without what follows a colon."""
    words = (ast.get_docstring(ast.parse(path.read_text())) or "").split()
    return " ".join(words).partition(". ")[0].partition(": ")[0].rstrip(".")


@command
def main(_args: list[str] | None = None) -> int:
    """Print every command of this folder with the first line of its docstring. Exit status 0."""
    everything = sorted(FOLDER.glob("[!_]*.py"))
    files = {p.stem: p for p in everything if '\nif __name__ == "__main__":' in p.read_text()}
    operators = [f"bench_{name}" for name in OPERATORS]
    for title, names in (
        ("Operators, checked against fp64 and timed beside PyTorch's and kernels of your own:", operators),
        ("The rest:", [name for name in files if name not in operators]),
    ):
        print(title)
        for name in names:
            print(f"  python -m benchmarks.{name:<28}{about(files[name])}")
        print()
    print(
        "--help says more of each. Results that are committed lie in benchmarks/results/: python -m benchmarks._harness"
    )
    return 0


if __name__ == "__main__":
    leave(main())
