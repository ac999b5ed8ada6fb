"""`moex train` that writes down which examples it reads, and ends itself when told to.

Run by `cluster/test_distributed.py` in the place of `moex.cli`, with three variables:
RECORD, a folder; DISTURB, "process signal batch": send that signal to that process when
it places that batch, once; DAMAGE: flip a bit of the newest checkpoint before the
second start.
"""

import json
import os
import pathlib
import sys

from moex import cli
from moex.train import loop
from tests import runs


def main(argv) -> None:
    (index,) = [int(a.split("=")[1]) for a in argv if a.startswith("--process-id=")]
    folder = pathlib.Path(os.environ["RECORD"])
    attempt = len(list(folder.glob(f"ids.{index}.*")))
    who, number, batch = map(int, os.environ.get("DISTURB", "-1 0 0").split())
    if os.environ.get("DAMAGE") and index == 0 and attempt == 1:
        steps = [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
        runs.flip_bit(max(steps, key=lambda p: int(p.name)) / "params")
    place, seen = loop.shard_batch, []

    def shard(rows, mesh):
        seen.append(rows["example_id"].tolist())
        file.write(json.dumps(seen[-1]) + "\n")
        if who == index and len(seen) == batch and attempt == 0:
            os.kill(os.getpid(), number)
        return place(rows, mesh)

    loop.shard_batch = shard
    with (folder / f"ids.{index}.{attempt}").open("w", buffering=1) as file:
        cli.main(argv)


def read(folder, attempt: int, count: int) -> list[list[int]]:
    """The ids of each global batch that all processes placed in an attempt."""
    parts = [
        map(json.loads, (folder / f"ids.{i}.{attempt}").read_text().splitlines())
        for i in range(count)
    ]
    return [sum(ids, []) for ids in zip(*parts, strict=False)]


if __name__ == "__main__":
    main(sys.argv[1:])
