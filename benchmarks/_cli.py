"""An operator's benchmark as a command and as pytest-benchmark tests.

It is a file of its own: a dataclass of options, the cases that these make (`_options`), and how inputs, providers and
the floor of a case are made (`_harness.Problem`).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._options import Case, Options, imported
from fastdistil.run import options as command_line
from fastdistil.run.command import Failed, Main, command
from fastdistil.run.files import write_json

if TYPE_CHECKING:
    from benchmarks._harness import Measured


def benchmark(name: str, kind: type[Options], cases: Callable[[Any], Iterable[Case]]) -> Main:
    """The command `python -m benchmarks.bench_NAME`.

    Exit status 0: all is right, and was measured. 1: ours, or what --also names, failed or is wrong. 2: a wrong command
    line.
    """

    @command
    def main(args: list[str] | None = None) -> int:
        options = command_line.parse(kind, args, f"bench_{name}", package="benchmarks")
        _run(name, options, cases)
        return 0

    return main


def _run(name: str, options: Any, cases: Callable[[Any], Iterable[Case]]) -> None:
    """Measure all cases, each of which is printed and written when it is done. Raises Failed for what is wrong."""
    import torch

    from benchmarks import _harness, _report

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = options.on
    if options.machine_code is not None:
        _read_machine_code(name, options, cases)
        return
    also = {spec: imported(spec) for spec in options.also}
    stamp = _harness.stamp(device)
    for path in (options.csv, options.plot, options.out):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    records: list[Measured] = []
    wrong: list[str] = []
    try:
        for case in cases(options):
            with _report.saying(f"{name} {case.name}") as say:
                ready = _harness.prepare(case, device, options.providers, also, options.time_wrong, say)
            record = _harness.measure(ready, options.rounds)
            records.append(record)
            _report.show(name, record)
            if options.results is not None:
                _harness.keep(name, case.name, record.as_json(), folder=options.results, device=device)
            if options.csv is not None:
                _report.write_csv(options.csv, name, records, stamp)
            if options.out is not None:
                whole = {"benchmark": name} | stamp | {"cases": {r.case: r.as_json(rounds=True) for r in records}}
                write_json(options.out, whole)
            wrong += record.failures(("ours", *also))
    finally:
        if options.plot is not None and records:
            _report.plot(options.plot, name, records, stamp)
    if wrong:
        raise Failed(
            "not right: "
            + ", ".join(f"{what} in {wrong.count(what)} of {len(records)}" for what in dict.fromkeys(wrong))
        )


def _read_machine_code(name: str, options: Any, cases: Callable[[Any], Iterable[Case]]) -> None:
    """Print what the kernels of ours and of --also take on a GPU that is not here. Each compilation is told once."""
    from benchmarks import _report, aot, no_gpu
    from benchmarks._harness import Provider

    driver = no_gpu.pretend(options.machine_code)
    also = {spec: Provider(spec, imported(spec)) for spec in options.also}
    nothing = True
    for case in cases(options):
        problem = case.build(device="meta", **case.sizes)
        rows = []
        for title, provider in ({"ours": problem.providers["ours"]} | also).items():
            before = len(driver.kernels)
            try:
                provider.call() if provider.is_bare else problem.results(provider.call)
            except Exception as error:
                raise Failed(f"{title} at {case.name}: {type(error).__name__}: {error}") from error
            rows += [
                (title, kernel.name, aot.report(kernel.cubin, kernel.metadata)) for kernel in driver.kernels[before:]
            ]
        if rows:
            _report.show_machine_code(name, case.name, rows)
        nothing = nothing and not rows
    if nothing:
        raise Failed("no Triton kernel was launched")


def compare(benchmark: Any, name: str, case: Case, folder: Path | None) -> None:
    """A case as a pytest-benchmark test: the same checks and rounds, in which ours has to be right. Kept in a folder.

    Ours is handed to `benchmark` as well.
    """
    from benchmarks import _harness, _report

    ready = _harness.prepare(case, _harness.DEVICE)
    record = _harness.measure(ready)
    print()
    _report.show(name, record)
    if folder is not None:
        _harness.keep(name, case.name, record.as_json(), folder=folder)
    assert not record.failures(["ours"])
    benchmark.extra_info.update({"case": case.name} | record.as_json())
    benchmark.pedantic(ready.calls[_harness.OURS], rounds=3 if record.rows[_harness.OURS]["median_ms"] > 1e3 else 10)
