"""Take the picture of the demo's report that README.md and the documentation show: its score matrices.

    everalign demo --output runs/demo && python scripts/report_picture.py runs/demo/report.html

Needs playwright and Chromium, as the tests of pages do.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "report.png"
WIDTH, SECTION = 1160, "#matrix"
MOST_BYTES = 200_000


def main() -> None:
    """Write the picture, and fail where it is too large for a repository."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="the HTML file that the demo wrote")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(arguments.report.resolve().as_uri())
        PICTURE.parent.mkdir(exist_ok=True)
        page.locator(SECTION).screenshot(path=PICTURE)
        browser.close()
    size = PICTURE.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{PICTURE}: {size} bytes, more than {MOST_BYTES}")
    print(f"{PICTURE}: {size} bytes")


if __name__ == "__main__":
    main()
