"""Object stores for tests: a file system with faults (`faulty:///tmp/x`), and an S3 server on this machine."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

SCHEME = "faulty://"


class Faulty(LocalFileSystem):
    """This machine's files, where what is to go wrong does."""

    protocol = ("faulty",)
    cachable = False
    on_write: ClassVar[Callable[[int, str], None] | None] = None
    """Is told the number of the write, from 1, and its path, and may raise, wait or end the process."""
    writes: ClassVar[int] = 0
    cut: ClassVar[str] = ""
    """Files with this in their path lose their last byte before anybody looks at them."""

    @classmethod
    def set(cls, on_write: Callable[[int, str], None] | None = None, cut: str = "") -> None:
        """Go wrong like this from now on, and count writes anew."""
        cls.on_write, cls.writes, cls.cut = on_write, 0, cut

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(str(path).removeprefix(SCHEME))

    def _count(self, path: str) -> None:
        Faulty.writes += 1
        if Faulty.on_write is not None:
            Faulty.on_write(Faulty.writes, path)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        if "w" in mode:
            self._count(path)
        return super()._open(path, mode=mode, block_size=block_size, **kwargs)

    def mv(self, path1: str, path2: str, recursive: bool = True, **kwargs: Any) -> None:
        self._count(path2)
        super().mv(path1, path2, recursive=recursive, **kwargs)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        here = Path(self._strip_protocol(path))
        if Faulty.cut and Faulty.cut in here.name and here.is_file():
            os.truncate(here, here.stat().st_size - 1)
        return super().info(path, **kwargs)


fsspec.register_implementation("faulty", Faulty, clobber=True)


def fail_at(number: int) -> Callable[[int, str], None]:
    """The write of this number fails."""

    def on_write(now: int, path: str) -> None:
        if now == number:
            raise OSError(f"no more room for {path}")

    return on_write


def die_at(number: int) -> Callable[[int, str], None]:
    """The process is gone at the write of this number."""

    def on_write(now: int, path: str) -> None:
        if now == number:
            os._exit(9)

    return on_write


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def s3_environment(port: int) -> dict[str, str]:
    """For a subprocess: this server, a login, and no long tries."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a-key-of-a-test",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-a-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }


@contextmanager
def s3(port: int) -> Iterator[Any]:
    """moto's S3 with an empty bucket, and its client of boto3."""
    import boto3  # pyright: ignore[reportMissingImports]
    from moto.server import ThreadedMotoServer  # pyright: ignore[reportMissingImports]

    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="a-key-of-a-test",
        aws_secret_access_key="a-secret-of-a-test",
    )
    try:
        client.create_bucket(Bucket="bucket")
        yield client
    finally:
        server.stop()
