"""Every command by one name: `fastdistil COMMAND ...`, which is `python -m fastdistil.COMMAND ...`."""

import sys
from importlib import import_module

from fastdistil import __version__
from fastdistil.run.command import command, leave
from fastdistil.run.options import nearest

COMMANDS = {
    "prepare": "text to shards: files, folders or a data set of the hub, tokenised and counted",
    "pretrain": "shards, and a teacher, to a run: the training itself, for torchrun, too",
    "export": "a run to a folder that Hugging Face loads",
    "evaluate": "scores of models, by their embeddings or fine-tuned on tasks",
    "efficiency": "parameters, size and speed of models",
    "study": "the paper's experiment on a teacher and text of yours, from pre-training to tables",
    "report": "runs to one HTML page that opens anywhere",
    "replay": "one update of a run again, micro-batch by micro-batch",
}
"""What each is for, in the order in which they are wanted."""


def main() -> None:
    """Run the command that the first word names, with its exit status; without one, say which there are."""
    name, *words = sys.argv[1:] or ["--help"]
    leave(import_module(f"fastdistil.{name}").main(words) if name in COMMANDS else other([name]))


@command
def other(args: list[str]) -> int:
    """What is no command. Exit status 0: help or version. 2: anything else, answered with the likeliest command."""
    (name,) = args
    if name == "--version":
        print(f"fastdistil {__version__}")
        return 0
    if name in ("-h", "--help", "help"):
        print("usage: fastdistil COMMAND ...     (`fastdistil COMMAND --help` shows its options)\n")
        for one, what in COMMANDS.items():
            print(f"  {one:<11} {what}")
        return 0
    likely = nearest(name.rpartition(".")[2], COMMANDS)
    raise ValueError(
        f"there is no command {name!r}{f': did you mean {likely[0]}?' if likely else ''}\n"
        f"  the commands are {', '.join(COMMANDS)}"
    )


if __name__ == "__main__":
    main()
