"""The command lines that README, docs and help print, to be checked and to be run."""

import argparse
import dataclasses
import importlib.util
import pathlib
import re
import shlex
from collections.abc import Iterator

from moex import cli, commands
from moex.commands.arguments import add_project
from moex.config.base import ConfigError
from moex.config.flags import load_config
from moex.runs.keys import check_run

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = {"cd", "moex", "make", "pip", "python", "sbatch", "source", "tensorboard"}
STARTS = re.compile(rf"(?:\w+=\S* )*(?:\S*/)?({'|'.join(sorted(PROGRAMS))}) +\S")
SETTING = re.compile(r"[A-Z_]+=\S*")
INLINE = re.compile(r"`([^`]+)`")
FENCE = re.compile(r"^ *```(\w*)")


@dataclasses.dataclass(frozen=True)
class Printed:
    """A command line of a page, without its comment.

    Attributes:
      page: path from the root, or `moex VERB --help`.
      text: the command line; it may have been several.
      whole: whether it stands on lines of its own, to be copied; else it is part of a
        sentence and may be cut short.
    """

    page: str
    text: str
    whole: bool = True

    @property
    def words(self) -> list[str]:
        """The words after the settings in front (`NAME=value`)."""
        words = shlex.split(self.text, comments=True)
        while words and SETTING.fullmatch(words[0]):
            words = words[1:]
        return words

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def of_page(page: str, text: str) -> Iterator[Printed]:
    """The commands of a page in Markdown, in order."""
    prose: list[str] = []
    block: list[str] = []
    language = None  # of the fence that we are in
    for line in [*text.splitlines(), ""]:
        fence = FENCE.match(line)
        inside = language is not None or line.startswith("    ")
        if block and (fence or not inside):
            yield from _of_block(page, block)
            block = []
        if fence:
            language = None if language is not None else fence[1]
        elif inside and language != "python":
            block.append(line)
        elif not inside:
            prose.append(line)
        if not line.strip() or fence:
            for found in INLINE.findall(" ".join(prose)):
                if STARTS.match(found):
                    yield Printed(page, found, whole=False)
            prose = []


def _of_block(page: str, lines: list[str]) -> Iterator[Printed]:
    """The commands of a block; if its first line is none, it is an output or a file."""
    found = [line.strip() for line in joined(lines) if line.strip()]
    if found and STARTS.match(found[0]):
        yield from (Printed(page, line) for line in found if not line.startswith("#"))


def joined(lines: list[str]) -> list[str]:
    """The lines of a shell, in which a backslash at the end joins two."""
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


def of_help(verb: str) -> Iterator[Printed]:
    """The commands among the examples of a verb."""
    for line in joined(commands.find(verb).epilog().splitlines()):
        if STARTS.match(line.strip()):
            yield Printed(f"moex {verb} --help", line.strip())


def everything() -> list[Printed]:
    """All commands, page after page."""
    found = []
    folders = ("docs", "benchmarks", "experiments", "launch", "configs")
    inner = [file for name in folders for file in sorted((ROOT / name).rglob("*.md"))]
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *inner]:
        page = str(file.relative_to(ROOT))
        found += of_page(page, file.read_text(encoding="utf-8"))
    for verb in commands.names():
        found += of_help(verb)
    return found


def wrong(command: Printed) -> str:
    """The first thing that is wrong with a command, or ""."""
    words = command.words
    program = words[0].rpartition("/")[2] if words else ""
    if command.whole and program != "sbatch" and "..." in command.text:
        return "cut short: nobody can run it as it stands"
    if program not in PROGRAMS:
        return f"{program!r} is no program that this test knows"
    check = globals()[f"_{program}"]
    try:
        return check(words[1:], command.whole) or ""
    except (ConfigError, SystemExit) as e:
        return str(e)


def _moex(words: list[str], whole: bool) -> str | None:
    if not whole and words[0].startswith("-"):
        return (
            None if words[0] in ("--help", "--version") else f"moex has no {words[0]}"
        )
    if words[0] not in commands.names():
        return f"there is no verb {words[0]}"
    rest, config_args = cli.split_config_args(words)
    if whole:
        args = cli.read_args(rest, config_args)
        if config_args and args.verb.refuses_config:
            return f"{words[0]} takes no --config"
    else:
        for flag in (w.partition("=")[0] for w in rest[1:] if w.startswith("-")):
            if flag not in _flags(rest[0]):
                return f"moex {rest[0]} has no {flag}"
    names = [a.partition("=")[2] for a in config_args if a.startswith("--config=")]
    fields = [a for a in config_args if a.startswith("--config.")]
    # The fields of runs and of own config files are compared with those of ours.
    # Words in capitals stand for any.
    ours = (n for n in names if re.match(r"configs/|[a-z]\w+(:|$)", n))
    name = next(ours, "quickstart")
    name = str(ROOT / name) if name.startswith("configs/") else name
    if "runs/parquet" not in words:
        check_run(load_config([f"--config={name}", *fields]), to_train=False)
    return None


def _flags(verb: str) -> set[str]:
    parser = argparse.ArgumentParser()
    add_project(parser)
    commands.find(verb).add(parser)
    return set(parser._option_string_actions)


def _python(words: list[str], whole: bool) -> str | None:
    if words[0] != "-m":
        known = (ROOT / words[0]).is_file()
        return None if known else f"there is no file {words[0]}"
    name, *words = words[1:]
    if "--" in words:  # the rest is a command line of `moex train`
        cut = words.index("--")
        words, own = words[:cut], words[cut + 1 :]
        if found := _moex(["train", *own], True):
            return found
    if name.partition(".")[0] not in ("benchmarks", "experiments", "launch", "tests"):
        known = importlib.util.find_spec(name) is not None
        return None if known else f"there is no module {name}"
    path = ROOT / name.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return f"there is no module {name}"
    sources = [file, *file.parent.glob("*.py")]
    source = "".join(f.read_text(encoding="utf-8") for f in sources)
    for flag in (w.partition("=")[0] for w in words if w.startswith("--")):
        if not flag.startswith("--config") and f'"{flag}"' not in source:
            return f"{name} has no {flag}"
    return None


def _make(words: list[str], whole: bool) -> str | None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        if "=" not in word and not re.search(rf"^{word}:", text, re.MULTILINE):
            return f"make has no {word}"
    return None


def _pip(words: list[str], whole: bool) -> str | None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extras in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        for extra in extras.split(","):
            if not re.search(rf"^{extra} = \[", text, re.MULTILINE):
                return f"pyproject.toml has no extra {extra}"
    return None


def _tensorboard(words: list[str], whole: bool) -> str | None:
    return None if words[0].startswith("--logdir") else f"{words[0]}: not --logdir"


def _sbatch(words: list[str], whole: bool) -> str | None:
    scripts = [w for w in words if w.endswith(".sbatch")]
    missing = [s for s in scripts if not (ROOT / s).is_file()]
    return f"there is no {missing[0]}" if missing else None


def _cd(words: list[str], whole: bool) -> str | None:
    return None if len(words) == 1 else "cd takes one folder"


def _source(words: list[str], whole: bool) -> str | None:
    known = words[0].endswith(("bin/activate", "bin/activate.fish"))
    return None if known else f"{words[0]}: no script of a virtual environment"
