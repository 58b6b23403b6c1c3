"""How much of what was given may be lost on its way to being learned: above a tenth it is said, above half refused.

Lost are answers that did not end within the limit of tokens, rows that are too long and left out, pairs of which the
cut leaves nothing to tell apart. A tenth is what one expects of real data now and then; of more the user should know,
because the flag that mends it is at hand. From half on, what is learned is no longer what was given.
"""

from everalign.errors import InputError

WARN_ABOVE = 0.1
"""Share that may be lost without a word, beyond what is logged anyway."""

REFUSE_ABOVE = 0.5
"""Share above which nothing is learned."""


class ShortfallError(InputError):
    """More than half of what was given is lost on the way."""


def check_shortfall(lost: int, total: int, what: str, remedy: str, *, refuse: bool = True) -> tuple[str, ...]:
    """Return a warning if more than a tenth is lost, else nothing.

    Args:
        lost: how many.
        total: of how many.
        what: what they are and what became of them, as in "12 of 40 WHAT".
        remedy: what to do about it; names the flag.
        refuse: whether more than half is an error; where the rest is still as good as it was, it is not.

    Raises:
        ShortfallError: more than half is lost.
    """
    if refuse and lost > REFUSE_ABOVE * total:
        raise ShortfallError(f"{lost} of {total} {what}, more than half: {remedy}")
    return (f"{lost} of {total} {what}: {remedy}",) if lost > WARN_ABOVE * total else ()
