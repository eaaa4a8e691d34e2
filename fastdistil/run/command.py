"""What every command stands on: the place that a launcher gave it, how it refuses, how it ends. Standard library only.

The environment that torchrun sets is read here and nowhere else. Exit statuses, the same for all commands:

0    done
1    failed: the work went wrong, and the last line says why
2    refused: the command line, or a file that it names, cannot be worked with, and the last line says what would be
75   stopped by a signal or --max-hours, with a checkpoint: the same command with --resume auto goes on (pretrain alone)
130  interrupted by SIGINT (Ctrl-C), 143 by SIGTERM, 129 and 138 by SIGHUP and SIGUSR1: what was finished is kept
141  whoever read its output has gone (`| head`)
"""

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, NoReturn, Self

from fastdistil import INTERRUPTED, end_at_once
from fastdistil.run import console

log = logging.getLogger("fastdistil")

_began = time.time()
"""When the command began."""
SPEAKS_FIRST_S = 1.0
"""For so long the ranks that say nothing of a refusal wait for the one that says it."""

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)
"""What interrupts a command, and asks a run that trains to stop with a checkpoint: schedulers, people, warnings of
preemption, a terminal that is closed. Windows has the first two alone."""
REPEATS_S = 5.0
"""Signals that follow the first within so many seconds are the same request."""
STOPPED = 75
"""Exit status of a run that a signal stopped, with a checkpoint: sysexits.h's EX_TEMPFAIL, "try again later"."""
SIGPIPE = 128 + 13
"""Exit status where nobody reads the output, by a number that Windows has no name for."""
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What makes a process one of several."""

Main = Callable[..., int]  # main(args: list[str] | None = None); None: the words of the command line


class Failed(Exception):
    """The work of a command failed, though its command line and files had been found right: exit status 1."""


def command(main: Main) -> Main:
    """`main` as a command, which ends with one of the statuses above, and says why in one line on stderr.

    Status 1 for Failed, 2 for ValueError and OSError, which say what was wanted, what was got and what to do; 130 or
    143 after a signal. Any other exception is a defect of the program, and keeps its traceback. `main` may be called
    in any process, with `args`: it returns the status there, and leaves signals as they were handled before.

    It works in one process. Of several that torchrun starts the first works, and the others are done at once.
    """
    return _command(main, on_all_ranks=False)


def command_of_ranks(main: Main) -> Main:
    """Like `command`, but the ranks that torchrun starts work together; the first one of a machine speaks."""
    return _command(main, on_all_ranks=True)


def _command(main: Main, *, on_all_ranks: bool) -> Main:
    @functools.wraps(main)
    def wrapped(args: list[str] | None = None) -> int:
        global _began
        _began = time.time()
        # OpenMP reads it when torch is imported. Threads that spin while they wait for one another take the cores from
        # whatever else runs here, data workers or another run: it was 4 to 30 times slower, and gains nothing alone.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        if not on_all_ranks and launched().by_torchrun:
            if launched().rank:
                return 0
            for name in LAUNCHER:
                os.environ.pop(name, None)  # what it imports or starts would wait for the ranks that have left
        with Interruption() as interruption:
            try:
                status = main(args)
                sys.stdout.flush()
                return status
            except BaseException as error:
                interruption.is_late = True
                return _status_after(error, interruption)
            finally:
                console.end()

    return wrapped


def _status_after(error: BaseException, interruption: "Interruption") -> int:
    """The exit status of a command that has raised `error`, which is raised again where it is a defect."""
    if interruption.number or isinstance(error, KeyboardInterrupt):
        # Whatever was raised: an import in C makes an ImportError of it, a pool whose workers got it, too, its own.
        number = signal.Signals(interruption.number or signal.SIGINT)
        _say(INTERRUPTED.format(number.name))
        return 128 + number
    if isinstance(error, BrokenPipeError) and any(map(_has_no_reader, (1, 2))):
        for descriptor in (1, 2):
            if _has_no_reader(descriptor):  # what is still in buffers goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        return SIGPIPE
    if not isinstance(error, Failed | ValueError | OSError):
        raise
    if launched().local_rank == 0:
        _say(f"error: {error}")
        _tell_torchrun(f"error: {error}")
    else:  # torchrun ends all ranks once one has failed, also the one that has not spoken yet
        time.sleep(SPEAKS_FIRST_S)
    return 1 if isinstance(error, Failed) else 2


def _say(line: str) -> None:
    if launched().local_rank == 0:
        with contextlib.suppress(OSError):  # a terminal that is gone
            print(line, file=sys.stderr, flush=True)


def _has_no_reader(descriptor: int) -> bool:
    """Whether this is a pipe that nobody reads any more; on Windows nobody can say."""
    if sys.platform == "win32":
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))  # Linux says the one, macOS both


def _tell_torchrun(text: str) -> None:
    """Put `text` where torchrun ends what it says of a failed job, as the cause: after its own traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None or os.path.exists(path):  # the traceback of a failed run stands there
        return
    # What torch.distributed.elastic.multiprocessing.errors writes there, without importing torch.
    about = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": about}, file)


class Interrupted(KeyboardInterrupt):
    """One of STOP_SIGNALS has come; raised wherever the program stands, so that what it has opened is closed."""


class Interruption:
    """Inside, STOP_SIGNALS raise Interrupted; `number` is the one that came, or 0. Puts the handlers back.

    What comes within REPEATS_S is the same request: a terminal and a launcher both signal. A later one ends the process
    at once. Handlers that somebody else has set, signals that are ignored (nohup, `&` in a script), and signals outside
    the main thread, where Python lets nobody handle them, are left as they are.
    """

    def __init__(self) -> None:
        self.number, self.came_at, self.before = 0, 0.0, {}
        self.is_late = False  # the command is ending by itself
        self.hook = sys.unraisablehook
        self.raises_in_logging = logging.raiseExceptions

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, end_at_once):
                    self.before[number] = signal.signal(number, self._handle)
            sys.unraisablehook = self._raise_again
        logging.raiseExceptions = False  # a run outlives whoever read its log, without a traceback a line
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        sys.unraisablehook, logging.raiseExceptions = self.hook, self.raises_in_logging

    def _handle(self, number: int, frame: object) -> None:
        if self.number and time.monotonic() - self.came_at > REPEATS_S:
            end_at_once(number, frame)
        if self.number or self.is_late:
            return
        self.number, self.came_at = number, time.monotonic()
        raise Interrupted

    def _raise_again(self, unraisable: Any) -> None:
        """Python drops an exception of a destructor or a callback, and would go on: the signal comes once more."""
        if not isinstance(unraisable.exc_value, Interrupted):
            return self.hook(unraisable)
        number, self.number = self.number, 0
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))  # after this hook, where it would be dropped, too
        again.daemon = True
        again.start()


@contextlib.contextmanager
def blocked(numbers: Collection[signal.Signals]) -> Iterator[None]:
    """Inside, these signals wait, and processes started here are deaf to them; not on Windows, which has no mask."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_installed(module: str) -> bool:
    """Whether there is such a package to import; it is not imported."""
    return importlib.util.find_spec(module) is not None


def require(what: str, extra: str, *modules: str) -> None:
    """Raises ValueError, which names the extra of this package that brings them, unless all modules are installed."""
    missing = [module for module in modules if not is_installed(module)]
    if missing:
        raise ValueError(f'{what} wants {", ".join(missing)}, not installed here: pip install "fastdistil[{extra}]"')


def num_cores() -> int:
    """CPU cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Launched(NamedTuple):
    """This process among those of its job; without a launcher it is a single one."""

    by_torchrun: bool
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    num_restarts: int
    """How often torchrun has started the job anew (--max-restarts)."""


def launched() -> Launched:
    """What RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and TORCHELASTIC_RESTART_COUNT say."""

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    return Launched(
        by_torchrun="RANK" in os.environ,
        rank=number("RANK", 0),
        world_size=number("WORLD_SIZE", 1),
        local_rank=number("LOCAL_RANK", 0),
        local_world_size=number("LOCAL_WORLD_SIZE", number("LOCAL_SIZE", 1)),  # as the deepspeed launcher calls it
        num_restarts=number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def started_at() -> float:
    """When this command began, or torchrun, whose --max-restarts start the ranks of a job anew; seconds since 1970."""
    if not launched().by_torchrun:
        return _began
    import psutil

    return psutil.Process(os.getppid()).create_time()


def again(args: list[str] | None, *more: str) -> str:
    """What to type to start this pretraining once more, with `more` in the place of its --resume, --dry-run and
    --world-size."""
    words = sys.argv[1:] if args is None else args
    kept, skips = [], False
    for word in words:
        is_dropped = skips or word.partition("=")[0] in ("--resume", "--dry-run", "--world-size")
        skips = word in ("--resume", "--world-size")
        kept += [] if is_dropped else [word]
    here, line = launched(), console.command_line("pretrain", *kept, *more)
    if here.world_size > here.local_world_size:
        return f"on every host, by torchrun as before: {line}"
    return line.replace("python", f"torchrun --nproc-per-node {here.world_size}", 1) if here.by_torchrun else line


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpu_bytes() -> int | None:
    """Memory of this machine's smallest GPU, as its driver says without torch (NVML); None where there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    count, sizes = ctypes.c_uint(), []
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    for index in range(count.value):
        gpu, memory = ctypes.c_void_p(), _Memory()
        found = nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(gpu))
        if not found and not nvml.nvmlDeviceGetMemoryInfo(gpu, ctypes.byref(memory)):
            sizes.append(memory.total)
    return min(sizes, default=None)


def leave(status: int) -> NoReturn:
    """sys.exit; under torchrun and after a signal without tearing down the interpreter while other threads are alive.

    DeepSpeed keeps its process groups to the end, and with them gloo's threads. A thread that frees a tensor after the
    interpreter has begun to end waits for a lock that nobody gives back, and PyTorch aborts: a finished run with exit
    status -6, in 13 of 28 runs under strace.
    """
    at_once = launched().by_torchrun or status >= 128
    ends = {signal.SIGINT, signal.SIGTERM} if at_once else {signal.SIGINT}
    for number in {*ends, *STOP_SIGNALS} if status == STOPPED else ends:  # a stop that is asked for twice is one
        signal.signal(number, signal.SIG_IGN)  # the status is known, and Python's own end would die of it
    if not at_once:
        sys.exit(status)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


class StopRequest:
    """Set by the first of STOP_SIGNALS; whoever works looks at `asked` when it can stop. Puts the handlers back.

    What comes within REPEATS_S is the same request: a scheduler signals every process of a job, and torchrun passes its
    own signal on. A later one ends the process. Outside the main thread, where Python lets nobody handle signals, it is
    never set. A hang-up that is ignored (nohup) stays ignored.

    Args:
        then: is called once, when a signal has asked.
    """

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.asked, self.reason, self.asked_at, self.then = False, "", float("inf"), then
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, reason: str) -> None:
        """Ask for the end; `reason` is what status.json says of it."""
        self.asked, self.reason, self.asked_at = True, reason, time.monotonic()

    def _ask(self, number: int, _frame: object) -> None:
        if not self.asked:
            self.asked = True  # before anything is called, where the second of two signals would come in between
            self.ask(signal.Signals(number).name)
            log.info("%s: stopping after this update; send it again after %g s to stop at once", self.reason, REPEATS_S)
            self.then()
        elif time.monotonic() - self.asked_at > REPEATS_S:
            asks_python = self.before[signal.Signals(number)] is signal.default_int_handler  # a notebook stays alive
            signal.signal(number, signal.default_int_handler if asks_python else signal.SIG_DFL)
            signal.raise_signal(number)


def visible_gpus(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the `count` GPUs that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]
