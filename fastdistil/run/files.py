"""Files that are whole or absent, and reading them back: JSON, lines of JSON, hashes, locks. Standard library only.

Whatever is replaced is written beside its final name as NAME.part and then renamed, so that a reader, and whoever comes
after a crash, sees the old contents or the new ones and never a half.
"""

import contextlib
import errno
import hashlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import IO, Any, Self

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LFS_POINTER = b"version https://git-lfs."
"""How the file begins that Git LFS leaves in the place of a large one."""
LOCKED_BYTE = 2**30
"""Of a lock's file on Windows, which need not have so many."""
LFS_FIX = "fetch what it stands for by `git lfs pull`"


def read_json(path: Path, *, kind: type = dict, fix: str = "") -> Any:
    """The JSON value in a file, which must be a `kind` (dict or list); `fix` says in the error what the user can do.

    Raises FileNotFoundError where there is no such file, ValueError, which names it, where it holds anything else.
    """
    ending = f": {fix}" if fix else ""
    try:
        data = path.read_bytes()
        if data.startswith(LFS_POINTER):
            raise ValueError(f"it is a Git LFS pointer: {LFS_FIX}")
        record = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist{ending}") from None
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: arrays nested thousands deep
        raise ValueError(f"{path} is not readable as JSON ({error}){ending}") from None
    if not isinstance(record, kind):
        raise ValueError(f"{path} must hold a JSON {_JSON_NAMES[kind]}, got {type(record).__name__}{ending}")
    return record


_JSON_NAMES = {dict: "object", list: "array"}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of one JSON object a line; none without the file.

    Lines that are no objects are left out: the last one may just be being written, or was when its writer was killed.
    """
    records = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def write_bytes(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Replace `path` by `data`; with `durable` it is on the disk, and not only with the system, when this returns."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # a full disk says no name
            error.filename = error.filename or str(path)
        raise


def make_room(out: Path | None) -> None:
    """Make the folder of a file that is written after long work; None: no file. Raises ValueError or OSError."""
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder: give a file in it")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, record: Any, *, durable: bool = False) -> None:
    """Replace `path` by `record` as indented JSON.

    Names of files that are not UTF-8 come back from `read_json` as they were.
    """
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="surrogatepass"), durable=durable)


def sync(path: Path) -> None:
    """Have the contents of a file, or the names in a folder, on the disk when this returns.

    Windows syncs what is open for writing, and no folder.
    """
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lock(file: IO[str]) -> None:
    """Raises OSError where another process has it; the lock goes when the file is closed."""
    if sys.platform == "win32":
        file.seek(LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """Keeps other processes out of what a file stands for, until `release` or the end of this process, however it ends.

    A POSIX record lock: over NFS it holds between machines, and forked data workers do not hold it. Closing any other
    descriptor of the file in this process would give it away, so the file is opened nowhere else. On Windows a lock of
    one byte, far behind the holder's name, which others could not read otherwise.

    Args:
        path: the file, made where it is missing; it names the holder while it is held.
        what: what is locked, for the error, e.g. "--out runs/a".

    Raises ValueError, naming the holder, where another process has it.
    """

    def __init__(self, path: Path, what: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a+", encoding="utf-8")
        try:
            _lock(self.file)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            self.file.seek(0)
            holder = self.file.read(200).strip() or "another process"
            raise ValueError(f"{what} is in use by {holder}: wait for it, stop it, or choose another --out") from None
        with contextlib.suppress(OSError):  # a full disk: it holds without a name, too
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.file.flush()

    def release(self) -> None:
        """Let others in; the file stays, empty."""
        self.file.truncate(0)
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
