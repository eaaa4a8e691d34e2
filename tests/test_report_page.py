"""The report in a browser: drawn, readable at three widths, in the light, in the dark and on paper; asks nobody."""

import itertools
import re
import struct

import pytest

from fastdistil import report
from tests.support import chromium
from tests.support.made_runs import make_noisy

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium, which draws the report: apt install it")

EVIL = "<img src=x onerror=window.hacked=1>"
WIDTHS = (390, 820, 1440)

PROBE = """(() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = rgb(getComputedStyle(e).backgroundColor);
      if (a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const faint = [], small = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
    if (!text || element.closest("script, noscript") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const pair = [luminance(rgb(style.color)), luminance(ground(element))].sort((x, y) => y - x);
    if ((pair[0] + 0.05) / (pair[1] + 0.05) < 4.5) faint.push(`${text}: ${style.color}`);
    if (parseFloat(style.fontSize) < 12) small.push(`${text}: ${style.fontSize}`);
  }
  const blank = [...document.querySelectorAll(".plot")].filter((plot) => {
    const canvas = plot.querySelector("canvas");
    if (!canvas) return true;
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const seen = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) seen.add(data.slice(i, i + 3).join());
    return !runColours.every((colour) => seen.has(colour));
  }).map((plot) => plot.id);
  const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".wide, pre, .plot")
    && e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80));
  return { faint, small, blank, wide, width: document.documentElement.scrollWidth };
})()"""


def state(name: str, update: int, **about: object) -> dict[str, object]:
    return {"state": name, "update": update, "updates": 800, "time": "2026-11-27T11:45:05+0000", **about}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of five runs that ended in five ways, one of whose names is markup."""
    root = tmp_path_factory.mktemp("page")
    runs = [
        make_noisy(root / "finished", updates=800, state=state("finished", 800), seed=1),
        make_noisy(root / "a-run-with-a-name-as-long-as-they-come", updates=500, state=state("running", 500), seed=2),
        make_noisy(root / "stopped", updates=400, state=state("stopped", 400, reason="SIGTERM"), seed=3),
        make_noisy(
            root / "nan", updates=300, state=state("failed", 300, reason="x" * 200), seed=4, nan=range(297, 301)
        ),
        make_noisy(root / EVIL, updates=12, state=None, seed=5),
    ]
    assert report.main([*map(str, runs), "--out", str(root / "report.html")]) == 0
    return root / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One for all tests; each opens its page anew."""
    with chromium.started(tmp_path_factory.mktemp("profile")) as found:
        yield found


def colours(css: str) -> list[dict[str, str]]:
    """The variables of the light and of the dark page."""
    light, dark = css.split("@media screen and (prefers-color-scheme: dark)")
    return [dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in (light, dark.partition("\n}")[0])]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everything_is_drawn_and_can_be_read(browser, page, tmp_path, width, dark):
    browser.open(page, width=width, dark=dark)
    drawn = [colours(STYLE)[dark][f"c{index}"] for index in range(4)]  # the fifth run has too few updates for all plots
    rgb = [",".join(str(int(c[i : i + 2], 16)) for i in (1, 3, 5)) for c in drawn]
    browser.ask(f"window.runColours = {rgb}; 0")
    found = browser.ask(PROBE)
    assert found == {"faint": [], "small": [], "blank": [], "wide": [], "width": width}
    browser.screenshot(tmp_path / "page.png")
    assert struct.unpack(">II", (tmp_path / "page.png").read_bytes()[16:24])[0] == width
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.ask("window.hacked") is None


def test_it_cannot_ask_for_anything(browser, page):
    browser.open(page, width=820)
    assert browser.ask("fetch('http://127.0.0.1:9/').then(() => 'asked', () => 'refused')") == "refused"
    assert "Content Security Policy" in " ".join(browser.complaints())
    script = "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))"
    assert browser.ask(f"{script}; window.hacked") is None


def readout(browser, key: str = "loss") -> str:
    return browser.ask(f"document.querySelector('#plot-{key} + .readout').textContent")


def picture(browser, key: str = "loss") -> str:
    return browser.ask(f"document.querySelector('#plot-{key} canvas').toDataURL()")


def test_axes_and_runs_can_be_chosen(browser, page):
    browser.open(page, width=1440)
    seen = {picture(browser)}
    for name in ("[value=tokens]", "[value=seconds]", "[name=log-x]", "[name=log-y]", "[name=run][value='0']"):
        browser.ask(f'document.querySelector("{name}").click()')
        seen.add(picture(browser))
    assert len(seen) == 6
    assert "finished" not in readout(browser)
    assert browser.complaints() == []


def test_values_are_read_by_keyboard_and_mouse(browser, page):
    browser.open(page, width=1440)
    assert readout(browser).startswith("at the end")
    browser.ask("document.getElementById('plot-loss').focus()")
    browser.key("End")
    at_end = readout(browser)
    assert at_end.startswith("update 800")
    browser.key("ArrowLeft")
    assert readout(browser) != at_end
    browser.key("Home")
    assert readout(browser).startswith("update 1")
    assert readout(browser, "mlm").startswith("update 1")  # the cursor is in all plots
    browser.ask("document.activeElement.blur()")
    box = browser.ask(
        "(() => { const e = document.querySelector('#plot-loss .u-over'); e.scrollIntoView();"
        " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + 50]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert re.match(r"update (39|40|41)\d", readout(browser))
    assert "finished" in readout(browser)


def test_how_a_run_ended_is_seen_on_its_line(browser, tmp_path):
    pictures = set()
    for name in ("finished", "running", "stopped", "failed", "unknown"):
        run = make_noisy(tmp_path / name / "run", updates=50, state=state(name, 50))
        assert report.main([str(run), "--out", str(tmp_path / "report.html")]) == 0
        browser.open(tmp_path / "report.html", width=820)
        pictures.add(picture(browser))
    assert len(pictures) == 4  # nobody knows how `unknown` ended: it looks like finished, without its badge


def test_every_plot_says_in_words_what_it_shows(browser, page):
    browser.open(page, width=390)
    words = browser.ask("[...document.querySelectorAll('.plot')].map((e) => e.getAttribute('aria-label'))")
    assert all("finished: from " in text for text in words)
    assert words[0].startswith("loss, all terms weighted, against updates.")


def test_on_paper_the_dark_page_is_light(browser, page, tmp_path):
    browser.open(page, width=820, dark=True)
    before = browser.ask("document.querySelector('.plot canvas').width")
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    browser.ask("dispatchEvent(new Event('beforeprint'))")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("document.querySelector('.plot canvas').width") < before
    assert browser.complaints() == []


# ------------------------------------------------------------------------------------------------------ colours of runs
STYLE = (report.PAGE / "report.css").read_text()
SEEN_BY = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def linear(colour: str) -> list[float]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    values = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def lab(rgb: list[float]) -> tuple[float, float, float]:
    r, g, b = (min(1.0, max(0.0, v)) for v in rgb)
    x, y, z = (
        0.4339 * r + 0.3762 * g + 0.1899 * b,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        0.0177 * r + 0.1095 * g + 0.8729 * b,
    )
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_colours_of_runs_are_apart_for_everybody(dark):
    """Distances in CIELAB, where 2 is what an eye can just tell apart; and 3 : 1 against the ground."""
    names = colours(STYLE)[dark]
    palette = {name: names[name] for name in (f"c{i}" for i in range(8))}

    def light(colour: str) -> float:
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True)) + 0.05

    for colour in palette.values():
        dim, bright = sorted((light(colour), light(names["ground"])))
        assert bright / dim >= 3
    for matrix in SEEN_BY.values():
        seen = {
            name: lab([sum(m * v for m, v in zip(row, linear(c), strict=True)) for row in matrix])
            for name, c in palette.items()
        }
        for one, other in itertools.combinations(seen, 2):
            distance = sum((a - b) ** 2 for a, b in zip(seen[one], seen[other], strict=True)) ** 0.5
            assert distance > 15, (one, other)
