"""Screenshot of a report for the README: docs/images/report.png, from the synthetic experiment of the tests.

python tools/report_image.py [CHROMIUM]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from raykd.report.build import write_report  # noqa: E402
from synthetic import full_experiment  # noqa: E402


def main() -> None:
    """Write the report of the synthetic experiment into a temporary folder and take its picture."""
    chromium = sys.argv[1] if len(sys.argv) > 1 else "chromium"
    image = ROOT / "docs" / "images" / "report.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_report(full_experiment(Path(folder)).write())
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1400,1000"]
        subprocess.run([chromium, *options, f"--screenshot={image}", f"file://{folder}/report.html"], check=True)


if __name__ == "__main__":
    main()
