"""Pages in a real headless Chromium: `pytest -m browser`."""

import html
import re
import shutil
import subprocess

import pytest

from moex import cli
from tests.report import pages

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Of a page that draws with a pixel of width, and never comes to rest.
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions"),
    *("--disable-background-networking", "--no-first-run", "--window-size=1280,2000"),
    *("--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"),
)
CONSOLE = re.compile(r'CONSOLE[:(]\d*\)?\] (".*)')

pytestmark = pytest.mark.browser


def browse(file, folder):
    """`(what the console says, the document once its scripts ran)`."""
    found = [path for name in NAMES if (path := shutil.which(name))]
    assert found, f"needs one of {', '.join(NAMES)}"
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [found[0], *OPTIONS, profile, file.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return CONSOLE.findall(done.stderr), done.stdout


def test_errors_and_requests_are_seen(tmp_path):
    # A page that may fetch nothing, as those of moex: every request is an error.
    rule = "default-src 'none'; script-src 'unsafe-inline'"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{rule}">'
    page = tmp_path / "page.html"
    page.write_text(policy + "<script>document.title = 2 * 21; nowhere()</script>")
    said, document = browse(page, tmp_path)
    assert "<title>42</title>" in document
    assert any("nowhere is not defined" in line for line in said), said
    page.write_text(policy + "<script>fetch('https://example.org/x')</script>")
    said, _ = browse(page, tmp_path)
    assert any("Content Security Policy" in line for line in said), said


def test_a_page_draws_all_its_plots(tmp_path):
    run = pages.write_run(
        tmp_path, tmp_path / "run", load=pages.sick, samples=(pages.EVIL,)
    )
    trace = pages.write_trace(tmp_path / "trace.parquet")
    _, page = pages.report(run, trace=trace, compare_trace=trace, markers=[" t1"])
    assert "Content-Security-Policy" in page.source
    said, document = browse(run / "report.html", tmp_path)
    assert said == []
    plots = document.count('class="plotly-graph-div')
    assert plots > 20
    assert plots == document.count("Plotly.newPlot(") - document.count(
        "Plotly.newPlot(", 0, document.index("</head>")
    )
    # Each has its axes and, but for those that are all blank, something drawn.
    assert document.count('class="cartesianlayer"') == plots
    for part in document.split('class="plotly-graph-div')[1:]:
        drawn = 'class="hm"' in part or 'class="trace scatter' in part
        assert drawn, part[:300]
    assert "<b onload" not in document
    # Whatever came into the page by a hole in our escapes would not run.
    file = run / "report.html"
    markup = "<script>document.title = 'evil'</script><img src=x onerror='evil()'>"
    text = file.read_text(encoding="utf-8").replace("</h1>", f"</h1>{markup}", 1)
    file.write_text(text, encoding="utf-8")
    said, document = browse(file, tmp_path)
    assert "<title>evil" not in document
    assert sum("Content Security Policy" in line for line in said) >= 2, said


NAMES_OF_RUNS = ("plain", "<img src=x onerror=alert(1)>", "{{7*7}} <b>&lt;", "%{x}")


def test_a_comparison_draws_and_shows_names_as_they_are(tmp_path):
    runs = [pages.write_run(tmp_path, tmp_path / name) for name in NAMES_OF_RUNS]
    file = tmp_path / "curves.html"
    cli.main(["compare", *map(str, runs), f"--out={file}"])
    said, document = browse(file, tmp_path)
    assert said == []
    assert document.count('class="cartesianlayer"') == 1
    assert document.count('class="trace scatter') == 2 * 3 * len(runs)  # three panels
    texts = re.findall(r'<text class="legendtext"[^>]*>(.*?)</text>', document)
    shown = {html.unescape(re.sub(r"</?tspan[^>]*>", "", text)) for text in texts}
    assert shown == {f"{run.name}{end}" for run in runs for end in ("", " (train)")}
    assert "<img" not in document and "<b>" not in document
