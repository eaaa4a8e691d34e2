"""URLs of object stores and other file systems, by fsspec, which is imported where one is given."""

import re
from pathlib import Path
from typing import Any

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+([^/].*|)", re.DOTALL)


def url_of(path: str | Path) -> str | None:
    """The URL in `path`, of which pathlib may have made one slash of two; None of what is a path."""
    found = _URL.fullmatch(str(path))
    if found is None or Path(path).exists():
        return None
    return f"{found[1]}://{'/' * (found[1] == 'file')}{found[2]}"


def storage(option: str, url: str) -> tuple[Any, str]:
    """(fsspec's file system, path on it without a slash at its end) of a URL, or of a folder of this machine.

    Raises ValueError where no installed package knows such a URL, and where a secret stands in it, which would be in
    logs and configurations.
    """
    if re.match(r"[^/]*://[^/@]*:[^/@]*@", url):
        raise ValueError(
            f"{option} wants a URL without a password, which would be kept with the run: give it where the package for "
            f"{url.partition(':')[0]} looks for it, an environment variable or its own file"
        )
    import fsspec

    try:
        # Listings are not kept: other machines write there, too.
        system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = re.search("(?i)install ([a-z0-9_-]+)", str(error))
        fix = f"`pip install {package[1]}`" if package else "install what it names"
        raise ValueError(f"{option} {url} wants a package that is not installed ({error}): {fix}") from None
    except ValueError as error:
        raise ValueError(f"{option} {url}: {error}: use s3://, gs://, abfs:// or another that fsspec knows") from None
    return system, root.rstrip("/")
