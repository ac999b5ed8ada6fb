"""`moex <command>`: reads the command line and runs one verb of `moex/commands/`.

argparse reads the command and its own flags; everything that starts with `--config`
goes to ml_collections. A user's mistake gives one line on stderr and exit code 2; a run
that cannot go on gives one line and exit code 1.
"""

import argparse
import contextlib
import os
import signal
import sys

from moex import __version__, commands, hints, interrupts, process, progress, project
from moex.allocator import keep_memory
from moex.cache import keep_programs
from moex.commands.arguments import add_project
from moex.config.base import ConfigError, RunError, nearest


class Parser(argparse.ArgumentParser):
    """Reports a mistake as one line, like every other mistake."""

    def error(self, message):
        raise ConfigError(
            f"{message}; see `{hints.command(*self.prog.split(), '--help')}`"
        )


def make_parser(argv: list[str]) -> argparse.ArgumentParser:
    """Make the parser of a command line, for all verbs or for the one it names.

    Raises:
      ConfigError: if the first argument is meant as a verb, but there is no such verb.
    """
    names = commands.names()
    if argv and not argv[0].startswith("-"):
        if argv[0] not in names:
            raise ConfigError(
                f"{argv[0]!r}: no such command.{nearest(argv[0], names)} "
                f"Commands are {', '.join(names)}."
            )
        names = argv[:1]
    parser = Parser(
        prog="moex",
        description="Train, score and sample mixture-of-experts language models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    import shtab  # late: scripts import this file on machines that lack it

    parser.add_argument("--version", action="version", version=f"moex {__version__}")
    shtab.add_argument_to(
        parser, "--print-completion", help="print the completion script of a shell"
    )
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in names:
        verb = commands.find(name)
        text = verb.description()
        one = verbs.add_parser(
            name,
            usage=f"moex {name} {verb.usage}" if verb.usage else None,
            help=text[:1].lower() + text[1:].split(".")[0],
            description=text,
            epilog=verb.epilog(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_project(one)
        verb.add(one)
        one.set_defaults(verb=verb)
    return parser


def read_args(rest: list[str], config_args: list[str]) -> argparse.Namespace:
    """Read the arguments that are not of the config.

    Raises:
      ConfigError: for a mistake; an unknown flag may be meant as a field of the config.
    """
    parser = make_parser(rest)
    args, unknown = parser.parse_known_args(rest)
    if not unknown:
        return args
    name = unknown[0].partition("=")[0]
    text = f"unrecognized arguments: {' '.join(unknown)}."
    verb = argparse.ArgumentParser(add_help=False)
    args.verb.add(verb)
    near = nearest(name, verb._option_string_actions)
    if not near and name.startswith("--") and not args.verb.refuses_config:
        near = _field_meant(name.lstrip("-"), config_args)
    if not name.startswith("-") and "run" not in args:
        near = _flag_meant(args, unknown[0])
    raise ConfigError(
        f"{text}{near} See `{hints.command('moex', args.command, '--help')}`."
    )


def _flag_meant(args: argparse.Namespace, name: str) -> str:
    """Write ` Did you mean --config=...?` if a lone argument names a config or run."""
    from moex.runs.directory import RunDir, given_config

    if args.verb.refuses_config:
        return ""
    try:
        given_config([f"--config={name}"])
    except ConfigError:
        return ""
    goes_on = args.command == "train" and RunDir(name).is_run()
    return f" Did you mean '--{'workdir' if goes_on else 'config'}={name}'?"


def _field_meant(name: str, config_args: list[str]) -> str:
    """Write ` Did you mean --config...?` if the config has a field of this name."""
    from moex.config.flags import fields_meant
    from moex.runs.directory import given_config

    try:
        found = fields_meant(given_config(config_args), name)
    except ConfigError:
        return ""
    return found.replace("'config.", "'--config.")


def split_config_args(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split `argv` into (arguments for argparse, arguments for ml_collections).

    `--config.a b` becomes `--config.a=b`.
    """
    rest, config = [], []
    args = iter(argv)
    for arg in args:
        name = arg.split("=", 1)[0].lstrip("-")
        if not arg.startswith("-") or name.split(".")[0] != "config":
            rest.append(arg)
            continue
        if "=" not in arg:
            value = next(args, None)
            if value is None:
                raise ConfigError(f"{arg}: a value is missing; write {arg}=VALUE.")
            arg = f"{arg}={value}"
        config.append("--" + arg.lstrip("-"))
    return rest, config


def main(argv: list[str] | None = None) -> None:
    """Run the `moex` command."""
    alone, argv = argv is None, sys.argv[1:] if argv is None else argv
    if alone:
        interrupts.listen()
    try:
        if alone:
            keep_memory()
            keep_programs()
            progress.show()
        rest, config_args = split_config_args(argv)
        args = read_args(rest or ["--help"], config_args)
        project.use(args.project)
        process.quiet()
        if config_args and args.verb.refuses_config:
            words = f"{args.command} {args.verb.refuses_config}"
            raise ConfigError(f"{config_args[0]}: {words}.")
        interrupts.truth = interrupts.outcome(args.verb.output(args), args.verb.left)
        working = progress.phase(f"moex {args.command}")
        with contextlib.nullcontext() if args.verb.talks else working:
            args.verb.run(args, config_args)
        sys.stdout.flush()
    except ConfigError as e:
        process.fail(e, 2)
    except KeyboardInterrupt as e:
        interrupts.leave(str(e) or f"interrupted; {interrupts.truth()}", alone)
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as e:  # for example, the disk is full
        process.fail(f"{e.filename}: {e.strerror or e}" if e.filename else e, 1)
    except RunError as e:
        process.fail(e, 1)
    except Exception as e:
        if interrupts.RAISED:  # Ctrl-C broke the import of an extension, for example
            interrupts.leave(f"interrupted; {interrupts.truth()}", alone)
        if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):
            reason = str(e).partition("\n")[0][:300]
            process.fail(
                f"out of memory ({reason}); see `moex plan` for what a job needs", 1
            )
        _fail_in_own_code(e)
        raise
    finally:
        if alone:  # the interpreter shuts down: Ctrl-C ends that without a traceback
            interrupts.ignore()


def _fail_in_own_code(error: Exception) -> None:
    """End with one line if an error came out of the user's own code."""
    at = project.where_in_own_code(error)
    if at is not None and os.environ.get("JAX_TRACEBACK_FILTERING") != "off":
        text = " ".join(str(error).split())
        hint = "JAX_TRACEBACK_FILTERING=off shows the whole traceback"
        process.fail(f"{at}: {type(error).__name__}: {text} ({hint})", 2)


if __name__ == "__main__":
    main()
