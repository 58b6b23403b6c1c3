"""Text of the report has the contrast of WCAG 2, level AA, in light and dark."""

import re
from importlib.resources import files

import pytest

TEXT, GRAPHICS = 4.5, 3.0
REPORT = files("everalign.reporting") / "templates" / "report.css"


def palettes(path):
    """The colours by name, of light pages and of dark ones."""
    blocks = re.findall(r":root \{(.*?)\}", path.read_text(), re.DOTALL)
    found = [dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", block)) for block in blocks]
    return found[0], {**found[0], **found[1]}


def channels(colour):
    return [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def mixed(front, back, share):
    parts = [share * x + (1 - share) * y for x, y in zip(channels(front), channels(back), strict=True)]
    return "".join(f"{round(255 * part):02x}" for part in parts)


def test_contrast_is_that_of_the_standard():
    assert contrast("000000", "ffffff") == pytest.approx(21)
    assert contrast("767676", "ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", [0, 1])
def test_the_report(scheme):
    colours = palettes(REPORT)[scheme]
    for text in ("ink", "muted", "accent", "good", "bad"):
        for ground in ("page", "panel"):
            assert contrast(colours[text], colours[ground]) >= TEXT, (text, ground)
    for number in range(8):
        assert contrast(colours[f"series-{number}"], colours["page"]) >= GRAPHICS
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):  # as the style sheet mixes it
        assert contrast(colours["ink"], mixed(colours["heat"], colours["page"], 0.08 + 0.5 * strength)) >= TEXT
