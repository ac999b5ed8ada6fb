"""Numbers as people write and read them."""

import math
from fractions import Fraction


def exact(number: float) -> Fraction:
    """The number whose shortest decimal form `number` has: 1.1 is 11/10.

    The float64 nearest to 1.1 is another number: 1.1 * 90 = 99.00000000000001 would be
    rounded up to one too many.
    """
    return Fraction(str(number))


def scaled(value: float, base: int = 1000, unit: str = "") -> str:
    """Write a number with a prefix: `1.45 G`, or in steps of 1024 `5.41 GiB`."""
    prefixes = ("", "k", "M", "G", "T", "P") if base == 1000 else _BINARY
    power = 0
    while power < len(prefixes) - 1 and abs(value) >= 999.5 * base**power:
        power += 1
    number = value / base**power
    digits = 0 if power == 0 else max(0, 2 - int(math.log10(max(number, 1))))
    return f"{number:.{digits}f} {prefixes[power]}{unit}".rstrip()


_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


def number_ranges(numbers: tuple[int, ...]) -> str:
    """Write numbers as `0-3`, `1-9 by 2`, or `0, 3, 4`."""
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if len(numbers) > 2 and len(steps) == 1 or steps == {1}:
        step = steps.pop()
        by = "" if step == 1 else f" by {step}"
        return f"{numbers[0]}-{numbers[-1]}{by}"
    return ", ".join(map(str, numbers))
