"""What a command says: its log, its bars, its tables and the command to type next. rich draws on a terminal.

A bar stays below the lines of the log. Elsewhere (a file, a pipe, a notebook, a terminal that cannot move its cursor)
there is no bar, and every line begins with its date and time. rich is imported where something is drawn: 0.1 s.
"""

import contextlib
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

log = logging.getLogger("fastdistil")
T = TypeVar("T")

DATED = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
KEPT = "console.log"
"""Name of the file in a run folder that has every line of the log."""
EVERY_S = 30.0
"""Between two lines of a loop where there is no bar."""
REDRAWN_S = 0.5
"""Between two looks of a bar. The loop draws it, no thread: data workers are forked, and would inherit its lock."""
UNFOLDED = 1000
"""Columns of what is no terminal."""
STYLES = {logging.WARNING: "yellow", logging.ERROR: "red"}


class _Plain(logging.StreamHandler[TextIO]):
    """Dated lines."""


class _Terminal(logging.Handler):
    """Lines above a bar, where there is one; what the bar shows itself (`live` of a record) is no line then."""

    def __init__(self, console: "Console") -> None:
        super().__init__()
        self.console = console
        self.bar: Bar | None = None

    def emit(self, record: logging.LogRecord) -> None:
        live = getattr(record, "live", None)
        if self.bar is not None and live is not None:
            self.bar.said = live or self.bar.said
            return
        try:
            style, whole = STYLES.get(record.levelno, ""), self.bar is None  # a bar below it would be cut like it
            self.console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=whole)
        except Exception:  # as logging's own handlers: a terminal that is gone
            self.handleError(record)


class _Kept(logging.Handler):
    """Lines of RUN/console.log; those from before the run has its folder wait."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Path | None = None
        self.waiting = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.waiting += self.format(record) + "\n"
        if self.run is not None:
            with contextlib.suppress(OSError):  # that nothing can be written there is said by the metrics
                append(self.run, self.waiting)
            self.waiting = ""


def now() -> str:
    """The date and time as the lines of a log begin with it."""
    return time.strftime(DATED.datefmt or "")


def append(run: Path, text: str) -> None:
    """Add to RUN/console.log. Opened anew each time: the folder may have been removed, and made again."""
    with (run / KEPT).open("a", encoding="utf-8", errors="replace") as file:
        file.write(text)


def start(stream: TextIO, *, speaks: bool = True, keeps: bool = False) -> None:
    """Let the log go to `stream`, unless the process has a log of its own already.

    Args:
        speaks: otherwise only errors are said, and no bar is drawn: this is not the first rank.
        keeps: whether `keep` will be called.
    """
    root = logging.getLogger()
    handlers: list[logging.Handler] = [] if root.handlers else [_handler(stream) if speaks else _Plain(stream)]
    handlers += [_Kept()] if keeps else []
    for handler in handlers:
        if not isinstance(handler, _Terminal):
            handler.setFormatter(DATED)
        root.addHandler(handler)
    log.setLevel(logging.INFO if speaks else logging.ERROR)


def _handler(stream: TextIO) -> logging.Handler:
    if stream.isatty():
        from rich.console import Console

        console = Console(file=stream)
        if console.is_interactive:
            handler = _Terminal(console)
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            return handler
    return _Plain(stream)


def keep(run: Path) -> None:
    """Write what was said so far, and what will be, to RUN/console.log."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Kept):
            handler.run = run


def end() -> None:
    """Leave the log of the process as `start` found it."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _Plain | _Terminal | _Kept)]:
        root.removeHandler(handler)


class Bar:
    """How far a loop is, as `bar` makes it."""

    def __init__(
        self, title: str, total: float | None, done: float, shown: Callable[[float], str], quiet: bool
    ) -> None:
        self.title, self.total, self.begin, self.shown = title, total, done, shown
        self.done, self.said = done, ""
        self.terminal = next((h for h in logging.getLogger().handlers if isinstance(h, _Terminal)), None)
        self.every_s = REDRAWN_S if self.terminal else float("inf") if quiet else EVERY_S
        self.began = self.drawn = time.monotonic()

    def to(self, done: float) -> None:
        """So much is done. Less than a microsecond, unless it is time to say so."""
        self.done, now = done, time.monotonic()
        if now - self.drawn < self.every_s and not (self.terminal and done == self.total):
            return
        self.drawn = now
        self.draw()

    def draw(self) -> None:
        """A line of the log, where there is no bar."""
        share = (self.done - self.begin) / (self.total - self.begin) if self.total and self.total > self.begin else 0.0
        left = f", {clock((self.drawn - self.began) * (1 / share - 1))} left" if share > 0 else ""
        log.info("%s: %s%s", self.title, self.amount(), left)

    def amount(self) -> str:
        """3 of 12"""
        return self.shown(self.done) + (f" of {self.shown(self.total)}" if self.total else "")


@contextlib.contextmanager
def bar(
    title: str,
    total: float | None,
    *,
    done: float = 0,
    shown: Callable[[float], str] = "{:,.0f}".format,
    quiet: bool = False,
) -> Iterator[Bar]:
    """Around a loop, which tells the Bar how far it is.

    Args:
        total: None where nobody knows.
        shown: how an amount is written.
        quiet: without a terminal say nothing: the loop does.
    """
    made = Bar(title, total, done, shown, quiet)
    if made.terminal is None:
        yield made
        return
    with _live(made, made.terminal) as draw:
        made.draw = draw  # type: ignore[method-assign]
        made.terminal.bar = made
        try:
            draw()
            yield made
        finally:
            draw()
            made.terminal.bar = None


@contextlib.contextmanager
def _live(made: Bar, terminal: _Terminal) -> Iterator[Callable[[], None]]:
    """What draws a bar on a terminal, with what was said last below it."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    progress = _progress(terminal.console)
    task = progress.add_task(made.title, total=made.total, completed=int(made.begin), amount=made.amount())

    def picture() -> Group:
        return Group(progress.get_renderable(), *([Text(made.said)] if made.said else []))

    live = Live(get_renderable=picture, console=terminal.console, auto_refresh=False)

    def draw() -> None:
        progress.update(task, completed=made.done, amount=made.amount())
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            live.refresh()

    with contextlib.suppress(OSError, ValueError):
        live.start()
    try:
        yield draw
    finally:
        with contextlib.suppress(OSError, ValueError):
            live.stop()


def _progress(console: "Console") -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    return Progress(*columns, console=console, auto_refresh=False, speed_estimate_period=600)


def progress(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """`items`, one after another, of which there are `total`; says how far it is."""
    with bar(title, total) as shown:
        for done, item in enumerate(items):
            shown.to(done)
            yield item
        shown.to(total)


def clock(seconds: float) -> str:
    """3725.2 -> 1:02:05"""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> "Table":
    """A table whose first column is words and whose others are figures; "" alone as a header has none."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD if any(header) else None, show_header=any(header), show_edge=False, pad_edge=False)
    for number, name in enumerate(header):
        made.add_column(Text(name), justify="right" if number and any(header) else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))  # a path may hold [brackets]
    return made


def show(what: Any, *lines: str) -> None:
    """Print a table, or whatever rich draws, on stdout, as wide as the terminal is; then the lines as they are.

    Where there is no terminal nothing is folded.
    """
    from rich.console import Console

    console = Console(file=sys.stdout, width=shutil.get_terminal_size((UNFOLDED, 25)).columns)
    with console.capture() as drawn:  # rich would end the program where nobody reads its output any more
        console.print(what)
    print("\n".join([*(line.rstrip() for line in drawn.get().splitlines()), *lines]))


def lines(what: Any, *, width: int = 80) -> list[str]:
    """What `show` prints in so many columns, as plain lines for a log."""
    from rich.console import Console

    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as drawn:
        console.print(what)
    return [line.rstrip() for line in drawn.get().splitlines() if line.strip()]


def command_line(module: str, *words: object) -> str:
    """What to type for a command of ours, quoted for the shell."""
    return shlex.join(["python", "-m", f"fastdistil.{module}", *map(str, words)])
