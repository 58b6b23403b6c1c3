"""The documentation's site: it builds without a warning, loads nothing from elsewhere, and has all commands."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from docs_for_tests import ROOT

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("mkdocs", "material", "mkdocstrings"))), reason="needs pip install 'everalign[docs]'"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_pages_load_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source|video)[^>]*\ssrc="?([^"\s>]+)', text)
        loaded += re.findall(r"<link[^>]*(?:stylesheet|preconnect|icon|preload)[^>]*>", text)
        assert not [one for one in loaded if "//" in one.replace("://127.0.0.1", "")], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_reference_has_every_command_and_flag(site):
    text = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    for command in ("everalign learn", "everalign correct distill", "everalign serve", "everalign feedback export"):
        assert f'id="{command.replace(" ", "-")}"' in text
    assert "--learning-rate" in text
    assert "--correction-timeout" in text


def test_a_browser_shows_pages_without_a_network(site):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium")
    asked = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        for name in ("index.html", "reference/command-line.html", "tutorials/policy-change.html", "results.html"):
            page.goto((site / name).as_uri())
            # Wide tables and code scroll by themselves; the page does not.
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
        browser.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
