"""How numbers are written: the metrics with their units, percentages, changes with a true minus sign."""

from __future__ import annotations

from dataclasses import dataclass

UNMEASURED = "–"


@dataclass(frozen=True)
class Metric:
    """One of a score's fields and how to print it: `scale` times the value, with `digits` decimals."""

    key: str
    title: str
    unit: str
    change_unit: str
    scale: float
    digits: int
    meaning: str

    def value(self, score: float | None) -> str:
        """The bare number, without its unit, for tables whose head names the unit."""
        return fixed(None if score is None else score * self.scale, self.digits)

    def full(self, score: float | None) -> str:
        """The number with its unit, for sentences."""
        return self.value(score) if score is None else f"{self.value(score)}{self.unit}"

    def change(self, difference: float | None) -> str:
        """A difference with its sign, without its unit; one that rounds to nothing has no sign."""
        return signed(None if difference is None else difference * self.scale, self.digits)

    def amount(self, difference: float) -> str:
        """A difference's size with its unit, for sentences."""
        return f"{fixed(abs(difference) * self.scale, self.digits)} {self.change_unit}"

    def direction(self, difference: float | None) -> str:
        """ "gained", "lost", or "" for a difference that rounds to nothing or was not measured."""
        text = self.change(difference)
        return {"+": "gained", "−": "lost"}.get(text[0], "")


METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            "accuracy",
            "Accuracy",
            "%",
            "points",
            100,
            1,
            "Share of held-out pairs whose chosen response has the higher likelihood per token.",
        ),
        Metric(
            "margin",
            "Margin",
            " nats per token",
            "nats per token",
            1,
            3,
            "Mean log-likelihood per token of the chosen response minus that of the rejected one.",
        ),
        Metric(
            "reward_accuracy",
            "Reward accuracy",
            "%",
            "points",
            100,
            1,
            "Share of held-out pairs with a positive margin against the base model; ties count half.",
        ),
    )
}


def fixed(number: float | None, digits: int) -> str:
    """`digits` decimals, a true minus sign, never a negative zero."""
    if number is None:
        return UNMEASURED
    text = f"{number:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("-", "−")


def signed(number: float | None, digits: int) -> str:
    """As `fixed`, with a plus sign before what is above zero."""
    text = fixed(number, digits)
    return f"+{text}" if number is not None and number > 0 and float(text) > 0 else text


def percent(share: float | None, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage."""
    return UNMEASURED if share is None else f"{fixed(100 * share, digits)}%"


def significant(number: float | None, digits: int = 3) -> str:
    """`digits` significant digits."""
    if number is None:
        return UNMEASURED
    return f"{number:#.{digits}g}".removesuffix(".").replace("-", "−")


def count(number: int) -> str:
    """A whole number with narrow no-break spaces between the thousands."""
    return f"{number:,}".replace(",", "\u202f")


def seconds(duration: float) -> str:
    """A duration in the largest fitting units."""
    if duration < 60:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shortened(text: str, length: int) -> str:
    """At most `length` characters: of a longer text the beginning and the end, which tell names apart."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"
