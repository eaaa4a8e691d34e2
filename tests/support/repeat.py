"""The same tests again and again: `python -m tests.support.repeat COUNT [pytest's arguments]`. At most one run may fail; says which tests did."""

import subprocess
import sys
import time

from tests.support.launch import ROOT


def main(count: int, arguments: list[str]) -> int:
    failed, begin = [], time.monotonic()
    for i in range(1, count + 1):
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            failed.append(i)
            print(done.stdout[-8000:], done.stderr[-2000:], flush=True)
        summary = (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]
        print(f"run {i} of {count}: {summary}; {len(failed)} failed, {time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
    print(f"{count - len(failed)} of {count} runs passed{f'; failed: {failed}' if failed else ''}")
    return int(len(failed) > 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
