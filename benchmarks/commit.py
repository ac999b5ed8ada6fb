"""The commit that figures were measured at."""

import os
import subprocess


def commit() -> str:
    """The value of MOEX_COMMIT (for a machine without the history), or git describe."""
    if named := os.environ.get("MOEX_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:
        return ""
    return said.stdout.strip()
