"""Types of command line arguments; their errors quote the given text."""

import argparse
import math
import pathlib

from moex.config.base import LARGEST, short


def path(text: str) -> pathlib.Path:
    """The argument type of a file or folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "must name a file or folder; the one you are in is '.'"
        )
    if "://" in text:  # as a path it would be a new folder here, such as `gs:`
        raise argparse.ArgumentTypeError(
            f"must be on this machine, such as in a bucket that is mounted, not {text}"
        )
    return pathlib.Path(text)


def folder(text: str) -> pathlib.Path:
    """The argument type of a folder that exists."""
    found = path(text)
    if not found.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return found


def integer(text: str) -> int:
    """The argument type of a whole number."""
    try:
        value = int(text)
    except ValueError:  # Python also refuses 4,300 digits and more
        value = None
    if value is None or abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at most {LARGEST:,}, not {short(text, 60)}"
        )
    return value


def positive(text: str) -> int:
    """The argument type of a whole number of at least 1."""
    value = integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def tolerance(text: str) -> tuple[float, float]:
    """The argument type of RTOL[,ATOL], which `--assert-equal` takes."""
    try:
        relative, absolute = map(
            float, (text if "," in text else f"{text},0").split(",")
        )
    except ValueError:
        relative, absolute = -1.0, 0.0
    if not (0 <= relative < 1 and 0 <= absolute < math.inf):
        raise argparse.ArgumentTypeError(
            f"must be RTOL or RTOL,ATOL with RTOL in [0, 1) and ATOL at least 0, not "
            f"{text!r}; runs come before it"
        )
    return relative, absolute
