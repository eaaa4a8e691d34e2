"""Times our operator and its peers in turn, prints a table, keeps the results as JSON beside the device's name.

A benchmark is a pytest-benchmark test that calls `compare`. Nothing else runs between a round of ours and a round of a
peer, so a machine that slows down slows all of them; medians are reported. pytest-benchmark's own statistics are of
ours alone. `python -m benchmarks._harness` prints one short table of all results kept for this device.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "fastdistil"


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def stamp() -> dict[str, str]:
    """What a result depends on besides the code: device, versions, commit."""
    from fastdistil.kernels._backend import CPU_BACKEND

    # A copy of the tree on a GPU machine is without its history, or has an older one: it is told its commit (carry.sh).
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": device_name(),
        "cpu_backend": CPU_BACKEND,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": os.environ.get("FASTDISTIL_COMMIT") or git.stdout.strip() or "unknown",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def results_file(benchmark: str, folder: Path = RESULTS) -> Path:
    """Where results of this device are kept: step.h100.json, step.cpu.json."""
    words = re.findall(r"[a-z0-9]+", device_name().lower())
    model = next((word for word in words if re.search(r"\d", word)), words[-1])
    return folder / f"{benchmark}.{model if DEVICE == 'cuda' else 'cpu'}.json"


def time_call(call: Callable[[], object]) -> float:
    """Seconds of one call, on the device's clock."""
    if DEVICE == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def peak_mib(call: Callable[[], object]) -> float | None:
    """MiB of device memory that a call takes at its peak, over what was allocated before. None on the CPU."""
    if DEVICE != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(
    benchmark: Any,
    name: str,
    case: str,
    providers: dict[str, Callable[[], object]],
    *,
    num_bytes: float,
    num_flops: float,
    floor: Callable[[], object] | None = None,
    budget_s: float = 12.0,
) -> dict[str, dict[str, Any]]:
    """Medians of every provider, taken in turn; provider "fastdistil" is ours and handed to `benchmark`.

    num_bytes and num_flops are the least that any implementation must move and compute. `floor` is the plainest call
    that moves as many bytes (or computes as many FLOP) on this machine, timed in the same rounds. A peer that fails is
    reported and left out; ours must not fail.
    """
    calls = dict(providers) | ({"floor": floor} if floor else {})
    rows: dict[str, dict[str, Any]] = {}
    for provider, call in list(calls.items()):
        try:
            call()  # compiles, tunes, warms the caches
            rows[provider] = {"peak_mib": peak_mib(call)}
        except Exception as error:
            if provider in (OURS, "floor"):
                raise
            rows[provider] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            del calls[provider]
    times: dict[str, list[float]] = {provider: [] for provider in calls}
    deadline = time.perf_counter() + budget_s
    while len(times[OURS]) < 5 or (time.perf_counter() < deadline and len(times[OURS]) < 100):
        for provider, call in calls.items():
            if DEVICE == "cpu":
                # PyTorch and Inductor keep a thread pool each, whose idle threads spin: not in the next one's time.
                time.sleep(0.02)
            times[provider].append(time_call(call))
    ours = statistics.median(times[OURS])
    for provider, seconds in times.items():
        median = statistics.median(seconds)
        # The ratio of a round to ours of the same round: what a machine with other work to do disturbs least.
        ratio = statistics.median(x / y for x, y in zip(seconds, times[OURS], strict=True))
        rows[provider] |= {
            "median_ms": median * 1e3,
            "min_ms": min(seconds) * 1e3,
            "gb_per_s": num_bytes / median / 1e9,
            "gflop_per_s": num_flops / median / 1e9,
            "times_ours": ratio,
        }
    _print(name, case, rows, num_bytes, num_flops)
    keep(name, case, {"bytes": num_bytes, "flops": num_flops, "providers": rows})
    benchmark.extra_info.update({"case": case, "bytes": num_bytes, "flops": num_flops, "rows": rows})
    benchmark.pedantic(providers[OURS], rounds=3 if ours > 1 else 10)
    return rows


def _print(name: str, case: str, rows: dict, num_bytes: float, num_flops: float) -> None:
    print(f"\n{name}: {case}; {num_bytes / 1e6:.1f} MB, {num_flops / 1e9:.2f} GFLOP; {device_name()}")
    print(f"  {'':<28}{'median ms':>11}{'min ms':>10}{'GB/s':>9}{'GFLOP/s':>10}{'x ours':>8}{'peak MiB':>10}")
    for provider, row in rows.items():
        if "error" in row:
            print(f"  {provider:<28}{row['error']}")
            continue
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(
            f"  {provider:<28}{row['median_ms']:>11.3f}{row['min_ms']:>10.3f}{row['gb_per_s']:>9.1f}"
            f"{row['gflop_per_s']:>10.1f}{row['times_ours']:>8.2f}{peak:>10}"
        )


def keep(name: str, case: str, record: dict[str, Any], *, folder: Path = RESULTS) -> None:
    """Put a case among the benchmark's results of this device, with what it depends on."""
    path = results_file(name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[case] = stamp() | record
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """One line for each case kept for this device: ours, the floor and the best peer."""
    print(f"{device_name()}, torch {torch.__version__}")
    print(f"{'case':<58}{'ours ms':>9}{'GB/s':>8}{'TFLOP/s':>9}{'floor':>7}  best peer")
    for path in sorted(RESULTS.glob(results_file("*").name)):
        for case, kept in json.loads(path.read_text()).items():
            found = kept.get("providers", {}) if isinstance(kept, dict) else {}
            rows = {k: row for k, row in found.items() if "median_ms" in row}
            if OURS not in rows:
                continue  # step, data and first_light print tables of their own
            ours, floor = rows[OURS], rows.get("floor")
            peers = {k: v for k, v in rows.items() if k != "floor" and not k.startswith(OURS)}
            best = min(peers, key=lambda k: peers[k]["median_ms"], default=None)
            ratio = f"{1 / floor['times_ours']:.2f}x" if floor else ""
            peer = f"{best} {peers[best]['times_ours']:.2f} x ours" if best else ""
            print(
                f"{path.name.split('.')[0] + ': ' + case:<58}{ours['median_ms']:>9.3f}{ours['gb_per_s']:>8.0f}"
                f"{ours['gflop_per_s'] / 1e3:>9.2f}{ratio:>7}  {peer}"
            )


if __name__ == "__main__":
    main()
