"""How far a loop has come: a bar on a terminal, a dated line now and then elsewhere (a log file, a notebook)."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger("fastdistil.evaluate")
T = TypeVar("T")
EVERY_S = 30.0


def progress(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """`items`, one after another, of which there are `total`."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=title)
        return
    begin = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= EVERY_S:
            last = now
            log.info("%s: %d of %d, about %.0f s left", title, done, total, (now - begin) / done * (total - done))
        yield item
