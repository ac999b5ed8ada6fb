"""Time and memory of a routing trace: writing it, and every statistic of it.

  python -m benchmarks.trace [--tokens=1000000] [--layers=8] [--json=FILE]

A tiny model (width 32) with many experts is trained for one step on random text, so
that routing and writing are what costs. Tracing, analysing and the report's page run
in a process each, as `moex trace`, `moex analyse` and `moex report`; the memory is the
most that the process had.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from benchmarks.common import write_json

CONFIG = """
from moex.configs import base
from moex.data.pipeline import Data
from moex.data.sources import Text
from moex.data.tokenizer import Bpe
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.stack import Segment
from moex.runs.keys import Eval, Log


def get_config(arg=""):
    cfg = base.get_config()
    moe = MoE(num_experts=EXPERTS, router=TopK(k=CHOSEN), experts=Glu(hidden=8))
    cfg.model = LM(
        dim=32,
        attention=Attention(heads=1),
        layers=(Segment(pattern=(moe,), repeat=LAYERS),),
    )
    text = Text(paths=("CORPUS",), delimiter="\\n\\n", holdout=0.02)
    cfg.data = Data(sources=(text,), tokenizer=Bpe(vocab=2048), cache_dir="CACHE")
    cfg.steps, cfg.batch_size, cfg.seq_len = 1, 2, 256
    cfg.optim.warmup_steps = 0
    cfg.eval = Eval(sequences=2, batch_size=32)
    cfg.log = Log(sample_tokens=0, tensorboard=False)
    return cfg
"""


def write_corpus(path: pathlib.Path, tokens: int) -> None:
    """Write documents of words with a Zipf distribution, two tokens a word or more."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(1 + tokens // 200):
            file.write(" ".join(rng.choices(words, weights, k=220)) + "\n\n")


def measured(*args) -> dict:
    """The seconds and the most bytes of memory of `moex ARGS`."""
    command = [sys.executable, "-m", "moex.cli", *map(str, args)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"moex {args[0]} failed")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_corpus(folder / "corpus.txt", args.tokens)
        text = CONFIG.replace("CORPUS", str(folder / "corpus.txt"))
        text = text.replace("CACHE", str(folder / "cache"))
        text = text.replace("EXPERTS", str(args.experts)).replace("CHOSEN", str(args.k))
        (folder / "config.py").write_text(
            text.replace("LAYERS", str(args.layers)), encoding="utf-8"
        )
        run, trace, early = folder / "run", folder / "t.parquet", folder / "e.parquet"
        measured("train", f"--config={folder / 'config.py'}", f"--workdir={run}")
        # Training ends with a score of all held-out data, so little is held out there.
        all_of_it = "--config.data.sources[0].holdout=1"
        tokens = f"--tokens={args.tokens}", all_of_it
        tenth = f"--tokens={args.tokens // 10}", all_of_it
        page = f"--out={folder / 'report.html'}"
        rows = {
            "write a tenth": measured("trace", run, f"--out={early}", *tenth),
            "write": measured("trace", run, f"--out={trace}", *tokens),
            "analyse a tenth": measured("analyse", early),
            "analyse": measured("analyse", trace, f"--out={folder / 'a.npz'}"),
            "compare too": measured("analyse", trace, f"--compare={trace}"),
            "report a tenth": measured("report", run, f"--trace={early}", page),
            "report": measured("report", run, f"--trace={trace}", page),
        }
        # Reading a trace needs no JAX and no model.
        from moex.analysis.trace import Trace

        with Trace.open(trace) as opened:
            num_tokens, size = opened.num_tokens, trace.stat().st_size
            start = time.perf_counter()
            for _ in opened.chunks():
                pass
            rows["read"] = {"seconds": time.perf_counter() - start}
    print(f"{num_tokens:,} tokens x {args.layers} layers: {size / 1e6:.0f} MB")
    for name, row in rows.items():
        peak = f"{row['peak_bytes'] / 1e6:10.0f} MB" if "peak_bytes" in row else ""
        print(f"{name:<16} {row['seconds']:8.1f} s {peak}")
    sizes = {"layers": args.layers, "experts": args.experts, "k": args.k}
    result = {"tokens": num_tokens, "file_bytes": size, "rows": rows}
    write_json(args.json, result | sizes)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
