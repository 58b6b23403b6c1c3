"""What the bench's table of answers says of itself."""

from types import SimpleNamespace

import pytest

from everalign.bench.tables import answers_about

TEXTS = {
    "reward_win_rate": "prefers the answer to that of er with",
    "length": "Length in characters.",
    "kl": "KL to the base model",
    "perplexity": "Perplexity of held-out chat: exp of the mean",
}


@pytest.mark.parametrize("shown", [["unfinished", "length"], ["reward_win_rate", "kl", "perplexity"]])
def test_only_what_is_shown_is_explained(shown):
    about = answers_about(SimpleNamespace(baseline="er"), shown)
    assert {name for name, text in TEXTS.items() if text in about} == TEXTS.keys() & shown
    assert ("(wins: from half)" in about) == ("reward_win_rate" in shown)
