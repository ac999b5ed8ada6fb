"""Run directories that are written line by line, and pages that are taken apart."""

import html.parser
import json

import numpy as np

from moex.report.command import run
from moex.train.job import save_config
from tests import runs

EVIL = "</script><script>window.evil=1</script><b onload=x>&amp;"
STEPS = tuple(range(10, 410, 10))
LABELS = ("001", "002.1", "002.2")


def routing_line(step, load, kind="train", **more):
    """A line of routing.jsonl; `load` by label."""
    layers = {
        label: {
            "load_frac": [round(float(v), 6) for v in share],
            "max_violation": float(np.max(share) * len(share) - 1),
            "dead_frac": float(np.mean(np.asarray(share) == 0)),
            "effective_frac": 0.9,
            "entropy": 1.2,
            "confidence": 0.4,
            "experts_per_token": 2.0,
            "experts_per_token_std": 0.0,
            "dropped_frac": 0.0,
            "lost_frac": 0.0,
            "unrouted_frac": 0.0,
            "zero_frac": 0.0,
            "logit_norm": 2.0,
            "slots_hist": [0.0, 0.25, 0.75],
        }
        | more
        for label, share in load.items()
    }
    return {"kind": kind, "step": step, "layers": layers}


def healthy(step):
    """Noisy balanced load of four experts in each of `LABELS`."""
    rng = np.random.default_rng(step)
    found = {}
    for label in LABELS:
        share = rng.uniform(0.8, 1.2, 4)
        found[label] = share / share.sum()
    return found


def sick(step):
    """Expert 2 of layer 1 dies after step 200; round 1 of layer 2 collapses."""
    found = healthy(step)
    if step > 200:
        found["001"] = np.array([0.5, 0.25, 0.0, 0.25])
    found["002.1"] = np.array([0.97, 0.01, 0.01, 0.01])
    return found


def train_line(step, nll):
    about = {"tokens_seen": step * 128, "grad_norm": 0.5, "lr": 0.01, "skipped": 0}
    perf = {"perf/step_s": 0.5, "perf/data_s": 0.1, "perf/tokens_per_s": 256.0}
    losses = {"nll": nll, "loss": nll, "bits_per_byte": nll / 2}
    return {"kind": "train", "step": step} | losses | about | perf


def write_run(folder, workdir, *, load=healthy, samples=("once",), extra=()):
    """A run directory with `STEPS` logged steps; `folder` has its corpus."""
    workdir.mkdir(parents=True)
    save_config(runs.config(folder, "model.vocab=257", "steps=400"), workdir)
    lines = [train_line(s, 3 + 2 * np.exp(-s / 100)) for s in STEPS]
    held = {"tokens": 1000, "bytes": 2000}
    for step in (200, 400):
        nll = {"nll": 3.5 - step / 1000, "bits_per_byte": 1.5, "nll/a": 3.1}
        domains = {f"nll/{EVIL}": 3.2}
        lines.append({"kind": "eval", "step": step} | nll | domains | held)
    lines.append({"kind": "sample", "step": 400, "texts": list(samples)})
    write_lines(workdir / "metrics.jsonl", [*lines, *extra])
    if load is not None:
        routed = [routing_line(step, load(step)) for step in STEPS]
        write_lines(workdir / "routing.jsonl", routed)
    return workdir


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(html.parser.HTMLParser):
    """A page as its reader sees it: text outside of scripts, tags, links."""

    def __init__(self, text):
        super().__init__()
        self.source = text
        self.words: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.quiet = ""
        self.feed(text)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.quiet = tag if tag in ("script", "style") else ""
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.words.append(" " if tag in ("td", "th") else "")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.quiet = ""

    def handle_data(self, data):
        if self.quiet == "script":
            self.scripts[-1] += data
        elif not self.quiet:
            self.words.append(data)


def report(workdir, **options):
    """`(what is printed, the page)`."""
    said = run(workdir, **options)
    out = options.get("out") or workdir / "report.html"
    return said, Page(out.read_text())
