"""Numbers as they were written: 1.1 is 11/10, not the float64 beside it.

A float product such as 1.1 * 90 = 99.00000000000001 is rounded up to one too many.
"""

from fractions import Fraction


def exact(number: float) -> Fraction:
    """The number whose shortest decimal form `number` has."""
    return Fraction(str(number))
