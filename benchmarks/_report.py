"""What an operator's benchmark shows and writes: tables, CSV, a figure."""

import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastdistil.run.files import write_text

if TYPE_CHECKING:
    from benchmarks._harness import Measured
    from benchmarks.aot import Report


class Column(NamedTuple):
    """One of the table."""

    title: str
    key: str
    """Of the row, which has it or leaves the cell empty."""
    cell: Callable[[Mapping[str, Any]], str]
    device: str = ""
    """The only one that has it."""


COLUMNS = (
    Column("median ms", "median_ms", lambda row: f"{row['median_ms']:.3f}"),
    Column("95 % interval", "low_ms", lambda row: f"{row['low_ms']:.3f} to {row['high_ms']:.3f}"),
    Column("GB/s", "gb_per_s", lambda row: f"{row['gb_per_s']:.1f}"),
    Column("GFLOP/s", "gflop_per_s", lambda row: f"{row['gflop_per_s']:.1f}", "cpu"),
    Column("TFLOP/s", "gflop_per_s", lambda row: f"{row['gflop_per_s'] / 1e3:.1f}", "cuda"),
    Column("speed-up", "speedup", lambda row: f"{row['speedup']:.2f}"),
    Column("value error", "error_value", lambda row: f"{row['error_value']:.1e}"),
    Column("gradient error", "error_gradient", lambda row: f"{row['error_gradient']:.1e}"),
    Column("peak MiB", "peak_mib", lambda row: f"{row['peak_mib']:.0f}", "cuda"),
)

WIDTH = 160
STATISTICS = ("median_ms", "low_ms", "high_ms", "min_ms", "max_ms", "mean_ms", "std_ms", "rounds", "gb_per_s")
STATISTICS += ("gflop_per_s", "speedup", "times_ours", "error_value", "error_gradient", "peak_mib")


def _console() -> Console:
    """On stdout as it is now. A terminal that is narrower than a table breaks its lines, which cuts no number."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    return console


@contextlib.contextmanager
def saying(what: str) -> Iterator[Callable[[str], None]]:
    """Inside, a terminal says what is made ready; compiling may take a minute."""
    with Console(stderr=True).status(what) as status:
        yield lambda step: status.update(f"{what}: {step}")


def show(name: str, record: "Measured") -> None:
    """Print the table of a case."""
    columns = [c for c in COLUMNS if any(c.key in row for row in record.rows.values())]
    columns = [c for c in columns if c.device in ("", record.device)]
    fewest = min((row["rounds"] for row in record.rows.values() if "rounds" in row), default=6)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        # Of fewer than 6 rounds all lie in it, which is less than 95 %.
        title = "min to max" if column.key == "low_ms" and fewest < 6 else column.title
        table.add_column(title, justify="right", no_wrap=True)
    notes = []
    for title, row in record.rows.items():
        if not row:  # a floor that was not timed
            continue
        bad = next((key for key in ("wrong", "error") if key in row), "")
        cells = [column.cell(row) if column.key in row else "" for column in columns]
        word = {"wrong": "wrong", "error": "failed"}.get(bad) or row.get("unchecked", "")
        if bad:
            notes.append(f"  {title} {'is wrong' if bad == 'wrong' else 'failed'}: {row[bad]}")
        table.add_row(title, *cells, word, style="red" if bad else "dim" if title == "floor" else "")
    console = _console()
    title = f"{name}: {record.case}; {record.num_bytes / 1e6:.1f} MB, {record.num_flops / 1e9:.2f} GFLOP"
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(note, style="red", markup=False, soft_wrap=True)
    console.print()


def show_machine_code(name: str, case: str, rows: Sequence[tuple[str, str, "Report"]]) -> None:
    """Print a line for each compilation of a case, (provider, kernel, report): what `benchmarks.aot` prints of ours."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("", "kernel"):
        table.add_column(head, no_wrap=True)
    for head in ("registers", "CTAs an SM", "spills", "stack", "shared", "instructions", "loads (bits: number)"):
        table.add_column(head, justify="right", no_wrap=True)
    for title, kernel, report in rows:
        loads = ", ".join(f"{bits}: {number}" for bits, number in sorted(report.loads.items()))
        numbers = (report.registers, report.ctas, report.num_spills, report.stack_bytes, report.shared_bytes)
        bad = report.num_spills or report.stack_bytes
        table.add_row(title, kernel, *map(str, numbers), str(report.mix["all"]), loads, style="red" if bad else "")
    console = _console()
    console.print(f"{name}: {case}", style="bold", markup=False)
    console.print(table)
    console.print()


def write_csv(path: Path, name: str, records: Sequence["Measured"], stamp: Mapping[str, str]) -> None:
    """A line for each case and provider."""
    lines = []
    for record in records:
        for title, row in record.rows.items():
            status = next(
                (key for key in ("wrong", "error") if key in row), "unchecked" if "unchecked" in row else "ok"
            )
            line = {"benchmark": name, "case": record.case} | record.sizes
            line |= {"bytes": record.num_bytes, "flops": record.num_flops, "provider": title}
            line |= {"status": {"error": "failed"}.get(status, status), "why": row.get(status, "")}
            lines.append(line | {key: row.get(key) for key in STATISTICS} | dict(stamp))
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, file.getvalue())


def plot(path: Path, name: str, records: Sequence["Measured"], stamp: Mapping[str, str]) -> None:
    """A line for each provider: GB/s of the cases, or TFLOP/s where products are what takes the time."""
    import pandas as pd

    from fastdistil.evaluation import plots

    by_flops = records[0].num_flops > 100 * records[0].num_bytes
    key, unit = ("gflop_per_s", "GFLOP/s") if by_flops else ("gb_per_s", "GB/s")
    varied = [k for k in records[0].sizes if len({str(r.sizes[k]) for r in records}) > 1]
    labels = ["\n".join(f"{k} {r.sizes[k]}" for k in varied) or r.case for r in records]
    titles = dict.fromkeys(title for r in records for title, row in r.rows.items() if key in row)

    def rates(title: str, of: str = "median_ms") -> pd.Series:
        rows = [r.rows.get(title, {}) for r in records]
        found = [row[key] * row["median_ms"] / row[of] if key in row else None for row in rows]
        return pd.Series(found, index=labels, dtype=float)

    same = ", ".join(f"{k} {x}" for k, x in records[0].sizes.items() if k not in varied)
    about = f"{name}: {same}\n{stamp['device']}, torch {stamp['torch']}, {stamp['commit']}"
    figure = plots.curves({title: rates(title) for title in titles}, "", unit, about)
    (axes,) = figure.axes
    for line, title in zip(axes.get_lines(), titles, strict=True):
        low, high = (rates(title, end) for end in ("high_ms", "low_ms"))
        axes.fill_between(labels, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_ylim(bottom=0)
    figure.set_size_inches(max(7.5, 1.2 * len(records)), 4.5)
    plots.save_png(figure, path)
