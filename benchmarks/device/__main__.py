"""A quarter of an hour on one GPU, in one command.

  python -m benchmarks.device --out=FOLDER [--minutes=12] [--steps=kernels,tiles,...]
      [--pack=FILE.tar.gz] [--wheels=FOLDER] [--commit=NAME] [--dry-run] [--in-process]
  python -m benchmarks.device --readme [--out=benchmarks/results/device]

Runs the table in `steps.py` in order of worth, each step in processes with limits of
their own, and writes `FOLDER/STEP.json` after every process. What a folder has is not
done again; what had failed is tried again after all that was not tried yet. Nothing is
left running when it ends, by itself, by a signal or by a kill.

Packages of moex that the machine's Python lacks are taken from `--wheels`; wheels.txt
says how to collect it. `--readme` writes the GPU's rows of benchmarks/README.md anew.
"""

import argparse
import atexit
import contextlib
import importlib.metadata
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import tomllib
import zipfile

from benchmarks.commit import commit
from benchmarks.device import readme, runner
from benchmarks.device.steps import STEPS

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def needed(wheels: pathlib.Path) -> list[pathlib.Path]:
    """Wheels that fit this Python, of what is missing or not what moex asks for."""
    from packaging.requirements import Requirement
    from packaging.tags import sys_tags
    from packaging.utils import canonicalize_name, parse_wheel_filename

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = map(Requirement, project["project"]["dependencies"])
    wanted = {canonicalize_name(r.name): r.specifier for r in asked}
    tags, found = set(sys_tags()), []
    for file in sorted(wheels.glob("*.whl")):
        name, _, _, fits = parse_wheel_filename(file.name)
        there = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            there = importlib.metadata.version(name)
        right = there is not None and (name not in wanted or there in wanted[name])
        if not right and tags & fits:
            found.append(file)
    return found


def add_wheels(wheels: pathlib.Path) -> None:
    """Puts the needed wheels on the path of this process and of those it starts."""
    if not (files := needed(wheels)):
        return
    site = tempfile.mkdtemp(prefix="moex-wheels-")
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    for file in files:
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(site)
    print("from wheels:", ", ".join(f.name.split("-")[0] for f in files), flush=True)
    sys.path.insert(0, site)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = site + (os.pathsep + before if before else "")


def stop(number, frame):
    raise runner.Stopped(signal.Signals(number).name)


def parsed() -> argparse.Namespace:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--steps", default=",".join(names))
    parser.add_argument("--pack", type=pathlib.Path, help="an archive of the results")
    parser.add_argument("--wheels", type=pathlib.Path, default=HERE / "wheels")
    parser.add_argument("--commit", help="where git does not know it")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on any device")
    parser.add_argument("--in-process", action="store_true", help="for a debugger")
    parser.add_argument("--readme", action="store_true", help="write the rows anew")
    args = parser.parse_args()
    if args.out is None and not args.readme:
        parser.error("--out=FOLDER is missing.")
    for name in args.steps.split(","):
        if name not in names:
            parser.error(f"--steps: {name!r} is none of {', '.join(names)}.")
    return args


def main() -> None:
    args = parsed()
    if args.readme:
        readme.write(args.out or readme.RESULTS)
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    os.environ["MOEX_COMMIT"] = args.commit or commit()
    add_wheels(args.wheels)
    # Processes start in this folder, as every benchmark does.
    out = args.out.resolve()
    archive = args.pack and args.pack.resolve()
    os.chdir(ROOT)
    try:
        status = runner.run_all(
            out,
            args.steps.split(","),
            seconds=60 * args.minutes,
            dry_run=args.dry_run,
            launch=runner.here if args.in_process else runner.isolated,
            archive=archive,
        )
    except runner.OtherKind as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except runner.Stopped as e:
        raise SystemExit(f"stopped by {e}; what was done is in {out}") from None
    for name, word in status.items():
        print(f"{name:<16}{word}")
    raise SystemExit(0 if set(status.values()) == {"done"} else 1)


if __name__ == "__main__":
    main()
