"""Run directories that are written line by line, and pages that are taken apart."""

import contextlib
import html.parser
import json

import numpy as np
import plotly.offline
import pytest

from moex.analysis.trace import Header, LayerInfo, Slots, Tokens
from moex.analysis.writer import TraceWriter
from moex.report.write import write_report
from moex.runs.directory import RunDir
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
    RunDir(workdir).save_config(runs.config(folder, "model.vocab=257", "steps=400"))
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


TRACED = (
    LayerInfo(layer=1, round=0, num_experts=4, num_choices=4, slots=2, router="TopK"),
    *(
        LayerInfo(
            layer=2, round=r, num_experts=4, num_choices=5, slots=3, router="TopP"
        )
        for r in (1, 2)
    ),
)
VOCABULARY = (EVIL, " t1", "t2\n", *(f"t{i}" for i in range(3, 20)))
DOMAINS = ("prose", EVIL)


def write_trace(file, *, tokens=400, seed=0, domains=DOMAINS, layers=TRACED, step=400):
    """Random routing; the last expert of a layer that is no round is never chosen."""
    rng = np.random.default_rng(seed)
    data = np.random.default_rng(0)  # equal tokens, whatever the routing
    tokenizer = {"fingerprint": "x", "doc_id": 0}
    header = Header(
        run="<i>run</i>",
        step=step,
        layers=tuple(layers),
        tokenizer=tokenizer,
        vocabulary=VOCABULARY,
        domains=domains,
        data={},
    )
    index_N = np.arange(tokens, dtype=np.int32)
    about = Tokens(
        example_N=index_N // 40,
        position_N=index_N % 20,
        document_N=index_N // 20,
        token_N=data.integers(0, len(VOCABULARY), tokens).astype(np.int32),
        domain_N=data.integers(0, len(domains), tokens).astype(np.int32),
    )
    with TraceWriter(file, header) as writer:
        slots = {info.label: _slots(rng, tokens, info) for info in layers}
        writer.write(about, slots)
    return file


def _slots(rng, tokens, info):
    choices = info.num_choices - (info.round == 0)
    order_NE = np.argsort(rng.uniform(size=(tokens, choices)), axis=1)
    count_N1 = (
        rng.integers(1, info.slots + 1, (tokens, 1)) if info.round else info.slots
    )
    score_NK = rng.uniform(0.1, 1.0, (tokens, info.slots)).astype(np.float32)
    keep_NK = np.broadcast_to(np.arange(info.slots), score_NK.shape) < count_N1
    return Slots(
        expert_NK=order_NE[:, : info.slots].astype(np.int32),
        keep_NK=keep_NK,
        gate_NK=score_NK,
        logit_NK=score_NK - 0.5,
        prob_NK=score_NK / 4,
    )


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


LIBRARY = "/* plotly */"


@contextlib.contextmanager
def small_library():
    """Pages without the 5 MB of plotly's own text, which take long to take apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plotly.offline, "get_plotlyjs", lambda: LIBRARY)
        yield


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
    said = write_report(workdir, **options)
    out = options.get("out") or workdir / "report.html"
    return said, Page(out.read_text())
