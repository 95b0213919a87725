"""Screenshot of a finished experiment's report for the README: docs/images/report.png.

python tools/report_image.py storage/experiments/quickstart [CHROMIUM]
"""

import subprocess
import sys
from pathlib import Path

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "report.png"


def main() -> None:
    """Take a picture of the report's first page with headless Chromium."""
    report = Path(sys.argv[1]).resolve() / "report.html"
    chromium = sys.argv[2] if len(sys.argv) > 2 else "chromium"
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1400,1000"]
    subprocess.run([chromium, *options, f"--screenshot={IMAGE}", report.as_uri()], check=True)


if __name__ == "__main__":
    main()
