"""`moex <command>`: from the command line to one function call each.

argparse reads the command and its own flags; everything that starts with `--config`
goes to ml_collections. A user's mistake is one line on stderr and exit code 2; a run
that cannot go on is one line and exit code 1.
"""

import _thread
import dataclasses
import functools
import io
import json
import logging
import os
import signal
import sys
import threading
import warnings

from moex import project
from moex.arguments import (
    LATENT_FLAGS,
    UPCYCLE_FLAGS,
    given,
    make_parser,
    many_flags,
)
from moex.cluster import distributed
from moex.cluster.connections import say
from moex.config.base import ConfigError, ConfigWarning, nearest, require
from moex.json_files import dump_json
from moex.terminal import Terminal


def split_config_args(argv: list[str]) -> tuple[list[str], list[str]]:
    """`argv` -> (arguments for argparse, arguments for ml_collections).

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
    """Entry point of the `moex` command."""
    alone, argv = argv is None, sys.argv[1:] if argv is None else argv
    if alone:
        _note_interrupts()
    try:
        rest, config_args = split_config_args(argv)
        _check_command(rest)
        args = make_parser().parse_args(rest)
        project.use(args.project)
        _quiet()
        COMMANDS[args.command](args, config_args)
    except ConfigError as e:
        _fail(e, 2)
    except KeyboardInterrupt as e:
        _leave(str(e) or "interrupted", alone)
    except ImportError:
        if not INTERRUPTS:  # else Ctrl-C came while an extension was imported
            raise
        _leave("interrupted", alone)
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as e:  # such as a full disk
        _fail(f"{e.filename}: {e.strerror or e}" if e.filename else e, 1)
    except (MemoryError, RuntimeError) as e:
        if _is_out_of_memory(e):
            reason = str(e).partition("\n")[0][:300]
            _fail(f"out of memory ({reason}); see `moex plan` for what a job needs", 1)
        if not _is_run_error(e):
            raise
        _fail(e, 1)


LONGEST = 2000  # characters of an error
INTERRUPTS: list[int] = []  # signals of Ctrl-C that came


def _note_interrupts() -> None:
    """Let no Ctrl-C be lost, wherever in a library it lands.

    Python only prints a `KeyboardInterrupt` of a callback, such as JAX's of the garbage
    collector; it is then raised again.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # a shell has Ctrl-C ignored for what runs in the background

    def interrupt(signum, frame):
        INTERRUPTS.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    report = sys.unraisablehook

    def unraisable(args):
        if args.exc_type is KeyboardInterrupt:
            # A moment later: now it would be lost in the same callback.
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            report(args)

    sys.unraisablehook = unraisable


def _leave(text: str, alone: bool) -> None:
    """End after Ctrl-C, with exit code 130.

    If this process is ours alone it ends at once: threads that read data or write files
    crash when the interpreter is taken apart under them.
    """
    (distributed.leave_now if alone else _fail)(text, 130)


def _check_command(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise ConfigError(
            f"{argv[0]!r}: no such command.{nearest(argv[0], COMMANDS)} "
            f"Commands are {', '.join(COMMANDS)}."
        )


def _fail(error, code: int) -> None:
    text = str(error)
    if len(text) > LONGEST:  # it quotes what somebody gave
        text = f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
    distributed.fail(text, code)  # in a job of several processes said once
    say(text)
    raise SystemExit(code)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _is_run_error(error: Exception) -> bool:
    from moex.analysis.equality import RunsDiffer
    from moex.plan.rehearsal import DoesNotFit
    from moex.runs.checkpoint import CheckpointError
    from moex.runs.lock import LockLostError
    from moex.train.loop import TrainingStopped

    known = (CheckpointError, DoesNotFit, LockLostError, RunsDiffer, TrainingStopped)
    return isinstance(error, known)


def _quiet() -> None:
    """Libraries raise errors and print nothing: a person reads the run's own lines.

    Those lines never fail, in a terminal of any encoding, and control no terminal.
    """
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout.isatty():
        sys.stdout = Terminal(sys.stdout)  # type: ignore[assignment]
    show = warnings.showwarning

    def showwarning(message, category, *where, **options):
        if issubclass(category, ConfigWarning):
            say(str(message), "warning")
        else:
            show(message, category, *where, **options)

    warnings.showwarning = showwarning
    report = sys.unraisablehook

    def unraisable(args):
        # After a failed save Tensorstore calls back into a loop that Orbax closed.
        if str(args.exc_value) != "Event loop is closed":
            report(args)

    sys.unraisablehook = unraisable


def _without_devices() -> None:
    """For what needs no accelerator: looking for one may take long, or take it."""
    import jax

    if jax.config.jax_platforms is None:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")


def _train(args, config_args):
    from moex.config.flags import load_config
    from moex.train.loop import train

    if args.workdir is None and not args.dry_run:
        raise ConfigError("--workdir: missing; give a folder, such as runs/first.")
    if args.sweep:
        if args.profile is not None:
            raise ConfigError("--profile: is for one run, not for a --sweep.")
        _sweep(args, config_args)
        return
    if args.sweep_index is not None:
        raise ConfigError("--sweep-index: is for --sweep; give both.")
    cfg = load_config(config_args)
    distributed.join(args, _told(cfg, args))
    made = train(cfg, args.workdir, dry_run=args.dry_run, profile=args.profile)
    distributed.leave()
    if made.get("interrupted"):
        raise SystemExit(130)


def _sweep(args, config_args):
    from moex.runs import sweep

    _without_devices()  # they are for the processes of the points
    made = sweep.make_sweep(args.sweep, config_args)
    points = sweep.choose(made, args.sweep_index)
    say = _say_once(args)
    if args.dry_run:
        say("\n".join(sweep.list_lines(made, args.workdir)))
        return
    sweep.claim(made, args.workdir)
    shared = [*config_args, *many_flags(args)]
    if args.sweep_index is None:
        own = [f"--workdir={args.workdir}", *(f"--sweep={text}" for text in args.sweep)]
        say(f"as a Slurm array job: {sweep.array_line(made, [*shared, *own])}")
    runner = sweep.Runner(args.workdir, say)
    failed = runner.run(points, shared)
    if runner.asked == signal.SIGINT:
        raise KeyboardInterrupt("interrupted; the same command goes on from here")
    if runner.asked is not None:
        say("sweep: stopped; the same command goes on from here")
    elif args.sweep_index is None and (line := sweep.compare_line(made, args.workdir)):
        say(f"compare: {line}")
    if failed:
        names = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        code = 1 if args.sweep_index is None else next(iter(failed.values()))
        _fail(f"{len(failed)} of {len(points)} runs of the sweep failed: {names}", code)


def _say_once(args):
    """`print` for one process of a job of several, silence for the others."""
    place = distributed.detect(os.environ)
    index = args.process_id or (place.index if place else 0)
    return functools.partial(print, flush=True) if not index else lambda text: None


def _told(cfg, args) -> dict:
    """What all processes of a job must be told alike."""
    import jax

    from moex.config import base as config

    return {
        "config": config.to_dict(cfg),
        "code of moex (a hash)": distributed.code_hash(),
        "version of JAX": jax.__version__,
        "--workdir": str(args.workdir),
        "--dry-run": args.dry_run,
        "--profile": args.profile,
    }


def _config(args, config_args):
    from moex.config import base as config
    from moex.config.flags import load_config

    cfg = load_config(config_args)
    print(
        json.dumps(config.to_dict(cfg), indent=1) if args.json else config.describe(cfg)
    )


def _params(args, config_args):
    from moex.config.flags import load_config
    from moex.costs import table

    cfg = load_config(config_args)
    if (args.like is None) != (args.match is None):
        raise ConfigError("--like and --match go together; give both.")
    if args.like is not None:
        like = load_config([f"--config={args.like}"])
        result = table.matched(cfg, like, args.match)
        print(json.dumps(result) if args.json else table.match_lines(result))
        return
    rows = table.model_rows(cfg)
    if args.json:
        print(json.dumps(table.rows_dict(cfg, rows)))
    else:
        print(table.rows_table(cfg, rows))


def _plan(args, config_args):
    from moex.config.flags import load_config
    from moex.plan.command import run

    if args.topology is None:
        raise ConfigError("--topology: missing; give devices, such as v5p:4x4x4.")
    cfg = load_config(config_args)
    _without_devices()
    run(cfg, args.topology, compile=args.compile, as_json=args.json)


def _compare(args, config_args):
    from moex.analysis.command import run

    if config_args:
        raise ConfigError(f"{config_args[0]}: compare takes the configs of the runs.")
    _without_devices()
    print(
        run(
            args.runs,
            as_json=args.json,
            out=args.out,
            tolerance=args.assert_equal,
        )
    )


def _report(args, config_args):
    from moex.report.command import run

    if config_args:
        raise ConfigError(f"{config_args[0]}: report takes the config of the run.")
    _without_devices()
    options = {"trace": args.trace, "compare_trace": args.compare_trace}
    print(run(args.run, out=args.out, markers=args.token, **options))


def _eval(args, config_args):
    if args.tasks is not None:
        _eval_tasks(args, config_args)
        return
    for name in ("include_path", "limit", "num_fewshot"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: is for --tasks.")
    from moex.train.score import score_run

    cfg = _scored_config(args, config_args)
    result = score_run(args.run, cfg, sequences=args.sequences)
    if args.json:
        print(dump_json(result))
        return
    what = f"tokens of {', '.join(args.data)}" if args.data else "held-out tokens"
    print(
        f"{args.run} at step {result['step']}, {result['tokens']:,} {what}:\n"
        f"  loss           {result['nll']:.4f} nats per token\n"
        f"  perplexity     {result['perplexity']:.3f}"
    )
    if result["bytes"]:
        print(f"  bits per byte  {result['bits_per_byte']:.4f}")
    for name, nll in result["domains"].items():
        print(f"  loss on {name}: {nll:.4f}")


def _eval_tasks(args, config_args):
    from moex.serve.harness import score_tasks

    for name in ("data", "sequences"):
        if getattr(args, name):
            config_args = [*config_args, f"--{name}"]
    if config_args:
        raise ConfigError(
            f"{config_args[0]}: --tasks takes the config of the run; see --limit."
        )
    result = score_tasks(
        args.run,
        args.tasks.split(","),
        include_path=args.include_path and str(args.include_path),
        limit=args.limit,
        num_fewshot=args.num_fewshot,
    )
    if args.json:
        print(dump_json(result))
        return
    print(f"{args.run} at step {result['step']}:")
    for task, figures in result["tasks"].items():
        for name, value in figures.items():
            print(f"  {task:<24} {name:<24} {value:.4f}")


def _scored_config(args, config_args):
    """The config of a run, or another one, with the data of --data if that is given."""
    from moex.config.flags import load_config
    from moex.data.from_paths import given_sources
    from moex.train.job import load_config as run_config

    base = run_config(args.run)
    if not args.data:
        return load_config(config_args, base=base)
    for arg in config_args:
        if arg.startswith(("--config=", "--config.data")):
            raise ConfigError(
                f"{arg.split('=')[0]}: --data takes the place of config.data; give "
                "one of the two."
            )
    cfg = load_config(config_args, base=base)
    sources = given_sources(args.data)
    cfg.data = dataclasses.replace(cfg.data, sources=sources)
    return cfg


def _trace(args, config_args):
    from moex.analysis.record import trace_run

    cfg = _scored_config(args, config_args)
    made = trace_run(
        args.run,
        cfg,
        args.out,
        tokens=args.tokens,
        step=args.step,
        logits=args.logits,
    )
    print(
        f"{args.out}: {args.run} at step {made['step']}, {made['tokens']:,} tokens, "
        f"{made['layers']} routers, {made['bytes'] / 1e6:.1f} MB"
    )


def _analyse(args, config_args):
    from moex.analysis import output
    from moex.analysis.statistics import saturation
    from moex.analysis.summary import analyse, compare
    from moex.analysis.trace import Trace
    from moex.analysis.writer import check_new

    if config_args:
        raise ConfigError(f"{config_args[0]}: analyse takes a trace and no config.")
    if args.out is not None:
        check_new(args.out)
    with Trace.open(args.trace) as trace:
        sums = {}
        if args.compare is not None:
            with Trace.open(args.compare) as other:
                sums = compare(trace, other)
        found = analyse(trace, markers=args.token or ())
    rows = output.figures(found)
    for label, sums_D2 in sums.items():
        rows[label]["saturation"] = float(saturation(sums_D2.sum(axis=0)[None])[0])
    if args.out is not None:
        output.save(found, args.out)
    if args.json:
        print(dump_json({"run": found.run, "step": found.step, "layers": rows}))
        return
    print(f"{found.run} at step {found.step}, {found.num_tokens:,} tokens:")
    print(output.table(rows))
    for marker, lines in output.marker_lines(found).items():
        print(f"experts of {marker!r} (nPMI, share of its tokens): {lines}")


def _generate(args, config_args):
    from moex.data.files import decode_utf8
    from moex.train.score import write_text

    if config_args:
        raise ConfigError(f"{config_args[0]}: generate takes the config of the run.")
    require(0 <= args.seed < 2**31, "--seed", args.seed, "in [0, 2**31)")
    prompts = args.prompt
    if not prompts:
        given = sys.stdin.buffer.read()
        prompts = [decode_utf8(given, "standard input", "--prompt")]
    texts = write_text(
        args.run,
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    print("\n--------\n".join(texts))


def _convert(args, config_args):
    from moex.compress.convert import convert_run, report_text

    if config_args:
        raise ConfigError(f"{config_args[0]}: convert takes the config of the run.")
    latent, upcycle = _conversion(args)
    print(report_text(convert_run(args.run, args.workdir, latent, upcycle=upcycle)))
    print(
        f"go on training: moex train --config={args.workdir / 'config.py'} "
        f"--workdir={args.workdir}"
    )


def _conversion(args):
    """`(ToLatent or None, Upcycle or None)` of the arguments of `convert`."""
    from moex.compress.to_latent import ToLatent
    from moex.compress.upcycle import Upcycle

    latent, upcycle = given(args, LATENT_FLAGS), given(args, UPCYCLE_FLAGS)
    if args.to == "moe" and latent:
        raise ConfigError(f"--{min(latent)}: is for --to=latent.")
    if upcycle or args.to == "moe":
        for name in ("experts", "k"):
            if name not in upcycle:
                raise ConfigError(f"--{name}: missing; dense layers need it.")
    made = Upcycle(**upcycle) if upcycle else None
    if args.to == "moe":
        return None, made
    if "group" not in latent:
        raise ConfigError("--group: missing; how many experts share a projection?")
    whiten = latent.pop("whiten", False)
    if "calibration" in latent and not whiten:
        raise ConfigError("--calibration: is for --whiten; give both.")
    if whiten:
        latent.setdefault("calibration", 256)
    if "ops" in latent:
        latent["ops"] = tuple(latent["ops"].split(","))
    return ToLatent(**latent), made


def _import_hf(args, config_args):
    from moex.interop.hf import import_hf

    import_hf(
        args.folder,
        args.out,
        config_args,
        tokenizer=args.tokenizer,
        doc_token=args.doc_token,
    )
    out = args.out.expanduser()
    print(f"go on training: moex train --config={out / 'config.py'} --workdir={out}")


def _export_hf(args, config_args):
    from moex.interop.export import export_hf

    if config_args:
        raise ConfigError(f"{config_args[0]}: export-hf takes the config of the run.")
    export_hf(args.run, args.out, dtype=args.dtype)


def _data(args, config_args):
    from moex.config.flags import load_config
    from moex.data.pipeline import prepare
    from moex.data.report import inspect
    from moex.runs.keys import check_run

    cfg = load_config(config_args)
    check_run(cfg)
    prepared = prepare(
        cfg.data, cfg.seq_len, overlap=cfg.eval.overlap, where="config.data"
    )
    if args.action == "inspect":
        print(inspect(prepared, example=args.example))


COMMANDS = {
    "train": _train,
    "config": _config,
    "params": _params,
    "plan": _plan,
    "compare": _compare,
    "report": _report,
    "eval": _eval,
    "generate": _generate,
    "trace": _trace,
    "analyse": _analyse,
    "convert": _convert,
    "import-hf": _import_hf,
    "export-hf": _export_hf,
    "data": _data,
}


if __name__ == "__main__":
    main()
