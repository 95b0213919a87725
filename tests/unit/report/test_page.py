"""The report's page in a browser: offline, on a phone and on a wide screen."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from raykd.config.experiment import BASE
from raykd.report.build import write_report
from synthetic import full_experiment

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed: it is Debian's package of that name")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-quic"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"]
FLAGS += ["--allow-file-access-from-files", "--enable-logging=stderr"]
# Folder for screenshots that are kept after the test.
SCREENSHOTS = os.environ.get("RAYKD_SCREENSHOTS")
MEASURE = """<!doctype html><iframe id=page style="width:{width}px;height:900px;border:0" src="{page}"></iframe>
<script>onload = () => {{ const root = document.getElementById("page").contentDocument;
for (const each of root.querySelectorAll("details")) each.open = true;
document.body.dataset.found = JSON.stringify({{ width: root.documentElement.scrollWidth,
  height: root.documentElement.scrollHeight, scripts: root.scripts.length,
  images: root.images.length, sections: root.querySelectorAll("section").length,
  figures: root.querySelectorAll("figure > svg").length,
  outside: [...root.querySelectorAll("svg.chart")].flatMap(figure => [...figure.querySelectorAll("text")]
    .filter(each => each.getBoundingClientRect().right > figure.getBoundingClientRect().right + 4
      || each.getBoundingClientRect().left < figure.getBoundingClientRect().left - 4).map(each => each.textContent))
  }}); }}
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a report with all sections and with hostile external text."""
    folder = tmp_path_factory.mktemp("report")
    experiment = full_experiment(folder)
    trials = {f"{arm}-{seed}": (arm, seed) for arm in ("none", "teacher", "ground_truth") for seed in (0, 1)}
    experiment.attention({BASE: (BASE, 0)} | trials)
    hostile = "<script>alert(1)</script><img src=http://example.com/x.png onerror=alert(2)> & \\boxed{7}"
    for row in experiment.rows[:200]:
        row["question"], row["completion"] = f"{hostile} {row['question']}", f"{hostile}\n{row['completion']}"
        row["reference_answer"] = hostile
    experiment.trial("confidence", 1, [], "confidence", status="failed", error=hostile)
    models = {"teacher": {"model": hostile, "revision": hostile}}
    experiment.run |= {
        "commands": [hostile],
        "harness": hostile,
        "models": models,
        "name": hostile,
        "platform": hostile,
    }
    experiment.completions(hostile, 3, ["none"])
    experiment.write()
    with (folder / "experiment.yaml").open("a") as file:
        file.write(f"# {hostile}\n")
    write_report(folder)
    return folder / "report.html"


def open_in_chromium(page: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Return Chromium's output for a page, in a new profile."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", *more, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("width", [400, 1400])
def test_page_fits_screen_without_scripts(page: Path, tmp_path: Path, width: int):
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(width=width, page=f"file://{page}"))
    done = open_in_chromium(frame, tmp_path, "--virtual-time-budget=5000", "--window-size=1500,1000", "--dump-dom")
    dumped = re.search(r'data-found="([^"]*)"', done.stdout)
    assert dumped, done.stderr
    found = json.loads(dumped[1].replace("&quot;", '"'))
    assert found["width"] <= width, "the page is wider than the screen"
    assert found["scripts"] == 0
    assert found["images"] == 0, "a figure is an external image"
    # Five of accuracy, one of training, one by layer and eight by head.
    assert found["figures"] == 15
    # No text leaves its figure on either side.
    assert found["outside"] == []
    assert found["sections"] >= 10
    assert "CONSOLE" not in done.stderr, done.stderr


@pytest.mark.parametrize("width", [400, 1400])
def test_screenshot_of_page_is_not_empty(page: Path, tmp_path: Path, width: int):
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    shot = folder / f"report-{width}.png"
    open_in_chromium(page, tmp_path, f"--window-size={width},9000", f"--screenshot={shot}")
    with Image.open(shot) as picture:
        assert picture.size == (width, 9000)
        colors = picture.convert("RGB").getcolors(maxcolors=1 << 24)
        assert colors and len(colors) > 50, "the page is empty"


def requested_hosts(page: Path, folder: Path) -> set[str]:
    """Return the requested hosts, without those of Chromium's vendor."""
    folder.mkdir(exist_ok=True)
    log = folder / "net.json"
    open_in_chromium(page, folder, f"--log-net-log={log}", "--virtual-time-budget=5000", "--dump-dom")
    hosts = set(re.findall(r'"url":"(?:https?|wss?)://([^/":]*)', log.read_text()))
    return {host for host in hosts if not re.search(r"(^|\.)(google|googleapis|gstatic)\.com$", host)}


def test_page_fetches_nothing_from_network(page: Path, tmp_path: Path):
    assert requested_hosts(page, tmp_path / "report") == set()
    # A request is detected.
    other = tmp_path / "other.html"
    other.write_text("<!doctype html><img src=http://example.com/x.png>")
    assert requested_hosts(other, tmp_path / "other") == {"example.com"}


@pytest.mark.parametrize("name", ["accuracy", "attention_by_layer", "attention_heads_entropy"])
def test_figure_file_is_not_empty_and_has_background(page: Path, tmp_path: Path, name: str):
    shot = tmp_path / "figure.png"
    open_in_chromium(page.parent / "report" / f"{name}.svg", tmp_path, "--window-size=520,400", f"--screenshot={shot}")
    with Image.open(shot) as picture:
        colors = picture.convert("RGB").getcolors(maxcolors=1 << 24)
        assert colors and len(colors) > 50, "the figure is empty"
        # The background is drawn, because some viewers have none.
        assert (255, 255, 255) in {color for _, color in colors}
