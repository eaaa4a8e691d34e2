"""The documentation: the site is built without a warning, the README is short, and what it links to is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_the_site_is_built_without_a_warning(tmp_path):
    """Options and operators stand in it with their docstrings; nothing is asked of another machine."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert "Tokens of one packed micro-batch" in pages["reference/options/index.html"]
    assert "linear_distill_loss" in pages["reference/operators/index.html"]
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="(https?:[^"]*)"', text)
        assert not loaded, f"{name} asks for {loaded}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", text, flags=re.MULTILINE)
    local = [a or b for a, b in targets if not re.match(r"(https?|mailto):|#", a or b)]
    missing = [target for target in local if not (page.parent / target.partition("#")[0]).exists()]
    assert not missing


def test_the_tutorial_works_as_it_stands(tmp_path):
    """Its blocks of shell, one after another in an empty folder."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL | re.MULTILINE)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    script = "\n".join(("set -e", *blocks))
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished after update 30 of 30" in done.stdout
    assert "(384,)" in done.stdout
    kept = re.search(r"^small +[\d.]+ +[\d.]+–[\d.]+ .* ([\d.]+) %", done.stdout, re.MULTILINE)
    assert kept
    assert 88 < float(kept[1]) < 98, "the page says 92.7 %"
    assert "The student keeps" in (tmp_path / "report.html").read_text()
