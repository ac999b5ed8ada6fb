"""Numbers as people write and read them."""

import pytest

from moex.numbers import exact, number_ranges, scaled


def test_a_number_is_what_its_decimals_say():
    assert 1.1 * 90 > 99
    assert exact(1.1) * 90 == 99


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((3,), "3"),
        ((0, 1), "0-1"),
        ((0, 1, 2), "0-2"),
        ((1, 3), "1, 3"),
        ((1, 3, 5), "1-5 by 2"),
        ((0, 2, 3), "0, 2, 3"),
    ],
)
def test_layer_numbers(numbers, text):
    assert number_ranges(numbers) == text


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((0,), "0"),
        ((999,), "999"),
        ((999.6,), "1.00 k"),
        ((46.7e9,), "46.7 G"),
        ((123_456_789,), "123 M"),
        ((5.4 * 2**30, 1024, "B"), "5.40 GiB"),
        ((20, 1024, "B"), "20 B"),
    ],
)
def test_scaled_numbers(args, text):
    assert scaled(*args) == text
