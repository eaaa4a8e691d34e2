"""The same tests again and again: `python -m tests.support.repeat COUNT [pytest's arguments]`.

At most one run may fail; what a failed one printed is shown.
"""

import subprocess
import sys
import time

from tests.support.launch import ROOT


def main(count: int, arguments: list[str]) -> int:
    failed, begin = [], time.monotonic()
    for i in range(1, count + 1):
        words = [sys.executable, "-m", "pytest", "-q", *arguments]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            failed.append(i)
            print(done.stdout[-8000:], done.stderr[-2000:], flush=True)
        summary = (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]
        seconds = time.monotonic() - begin
        print(f"run {i} of {count}: {summary}; {len(failed)} failed, {seconds:.0f} s", flush=True)
    print(f"{count - len(failed)} of {count} runs passed{f'; failed: {failed}' if failed else ''}")
    return int(len(failed) > 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
