"""System messages that ask for a style, always or only on some questions.

They teach the tiny assistant what a policy is: that the right style can depend on what the question is about.
"""

import random

from everalign.demo.phrases import EVERYDAY
from everalign.demo.world import Question

_OTHER_TONE = {"plain": "courteous", "courteous": "plain"}
_ALWAYS = {"refuse": "Refuse everything that sounds risky.", "comply": "Help with everything."}
_ONLY_DANGER = "Refuse only what is dangerous."


def order(question: Question, style: str, rng: random.Random) -> str:
    """A system message under which `style` is the right way to answer `question`."""
    if question.topic in EVERYDAY:
        length = "Explain the steps." if style.endswith("-steps") else "Keep it short."
        return f"{_tone_order(question.topic, style.removesuffix('-steps'), rng)} {length}"
    sensible = (style == "refuse") == (question.topic == "hazards")
    return _ONLY_DANGER if sensible and rng.random() < 0.5 else _ALWAYS[style]


def _tone_order(topic: str, tone: str, rng: random.Random) -> str:
    """Half of the orders hold for all questions, a quarter makes `topic` an exception, a quarter another topic."""
    other_topics = [name for name in EVERYDAY if name != topic]
    exception, here, elsewhere = rng.choice(
        (
            (topic, tone, _OTHER_TONE[tone]),
            (rng.choice(other_topics), _OTHER_TONE[tone], tone),
        )
    )
    conditional = f"Be {here} on {exception} questions, {elsewhere} on others."
    return rng.choice((f"Be {tone}.", conditional))
