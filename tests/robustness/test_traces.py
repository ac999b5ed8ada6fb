"""Traces, metrics, routing figures and environments that were crafted or damaged.

Each goes through the commands that read it. It is refused in one line that names the
file, or the command gives what it gives for the file as it was; for logs, where any
figure may be true, a page in which no text of the file runs.
"""

import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.report import pages
from tests.robustness.attacks import check_no_traceback, check_refused, moex, some

KEY = b"moex.trace"
SECONDS = 30
GONE = object()


# Traces.


def rewrite(file, header=None, change=None):
    """Write a trace anew: `header` changes its header, `change` its tables."""
    read = pq.ParquetFile(file)
    tables = [read.read_row_group(i) for i in range(read.num_row_groups)]
    text = read.schema_arrow.metadata[KEY]
    if header is not None:
        made = header(json.loads(text))
        text = made if isinstance(made, bytes) else json.dumps(made).encode()
    tables = tables if change is None else change(tables)
    schema = tables[0].schema.with_metadata({KEY: text})
    with pq.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=max(len(table), 1))


def header(*path, value):
    """A changed field of the header; `GONE` removes it."""

    def change(data):
        holder = data
        for name in path[:-1]:
            holder = holder[name]
        if value is GONE:
            del holder[path[-1]]
        else:
            holder[path[-1]] = value
        return data

    return lambda file: rewrite(file, header=change)


def raw_header(text):
    return lambda file: rewrite(file, header=lambda data: text)


def column(name, function):
    """`function` over one column of every table; it may return another type."""

    def change(tables):
        made = []
        for table in tables:
            values = function(table.column(name))
            place = table.schema.get_field_index(name)
            made.append(table.set_column(place, pa.field(name, values.type), values))
        return made

    return lambda file: rewrite(file, change=change)


def values(name, kind, function):
    """As `column`, of Python values."""

    def changed(array):
        return pa.array([function(v) for v in array.to_pylist()], kind)

    return column(name, changed)


def on_tables(function):
    return lambda file: rewrite(file, change=function)


def flipped(number):
    def attack(file):
        rng = random.Random(f"trace {number}")
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)

    return attack


def cut(share):
    def attack(file):
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])

    return attack


WRONG = {
    **{"null": None, "text": "x", "list": [], "object": {}, "negative": -1},
    **{"huge": 2**63, "float": 0.5, "true": True, "gone": GONE},
}
LIST16 = pa.list_(pa.int16())
TRACES = {
    **{f"flip-{i}": flipped(i) for i in range(24)},
    **{f"cut-{share}": cut(share) for share in (0.0, 0.3, 0.9, 0.999)},
    "text": lambda file: file.write_text("not parquet"),
    "header-not-json": raw_header(b"{"),
    "header-null": raw_header(b"null"),
    "header-empty": raw_header(b"{}"),
    "header-list": raw_header(b"[]"),
    "header-deep": raw_header(b"[" * 100_000),
    "header-digits": raw_header(b'{"version": ' + b"9" * 5000 + b"}"),
    "header-not-utf8": raw_header(b'{"\xff": 1}'),
    **{f"version-{n}": header("version", value=v) for n, v in WRONG.items()},
    **{f"step-{n}": header("step", value=v) for n, v in WRONG.items()},
    **{f"run-{n}": header("run", value=v) for n, v in WRONG.items()},
    **{f"layers-{n}": header("layers", value=v) for n, v in WRONG.items()},
    **{f"vocabulary-{n}": header("vocabulary", value=v) for n, v in WRONG.items()},
    **{f"domains-{n}": header("domains", value=v) for n, v in WRONG.items()},
    **{f"tokenizer-{n}": header("tokenizer", value=v) for n, v in WRONG.items()},
    **{f"logits-{n}": header("logits", value=v) for n, v in WRONG.items()},
    **{
        f"layer-{name}-{n}": header("layers", 0, name, value=v)
        for name in ("layer", "num_experts", "num_choices", "slots", "router")
        for n, v in WRONG.items()
    },
    "layers-numbers": header("layers", value=[1, 2, 3]),
    "layers-twice": header("layers", 1, "layer", value=1),
    "layer-unknown-field": header("layers", 0, "colour", value=1),
    "unknown-field": header("colour", value=1),
    "vocabulary-short": header("vocabulary", value=["a"]),
    "vocabulary-numbers": header("vocabulary", value=list(range(20))),
    "domains-other": header("domains", value=["a", "b"]),
    "domains-twice": header("domains", value=["prose", "prose"]),
    "domains-many": header("domains", value=[f"d{i}" for i in range(100_000)]),
    "experts-many": header("layers", 0, "num_choices", value=10**7),
    "slots-many": header("layers", 0, "slots", value=10**9),
    "token-far": values("token", pa.int32(), lambda v: v + 1000),
    "token-negative": values("token", pa.int32(), lambda v: -1),
    "token-null": values("token", pa.int32(), lambda v: None),
    "token-text": values("token", pa.string(), str),
    "token-float": values("token", pa.float64(), float),
    "position-back": values("position", pa.int32(), lambda v: -v),
    "document-far": values("document", pa.int32(), lambda v: v * 10_000_000),
    "example-text": values("example", pa.string(), str),
    "domain-text": values("domain", pa.string(), lambda v: v),
    "domain-unknown": values("domain", pa.string(), lambda v: "elsewhere"),
    "expert-far": values("expert", LIST16, lambda v: [x + 100 for x in v]),
    "expert-negative": values("expert", LIST16, lambda v: [-1 for _ in v]),
    "expert-twice": values("expert", LIST16, lambda v: [v[0] for _ in v]),
    "expert-empty": values("expert", LIST16, lambda v: []),
    "expert-null": values("expert", LIST16, lambda v: None),
    "expert-nulls": values("expert", LIST16, lambda v: [None for _ in v]),
    "expert-long": values("expert", LIST16, lambda v: [0] * 9),
    "expert-number": values("expert", pa.int16(), lambda v: v[0]),
    "layer-other": values("layer", pa.int16(), lambda v: 77),
    "round-other": values("round", pa.int8(), lambda v: 9),
    "no-rows": on_tables(lambda tables: [t.slice(0, 0) for t in tables]),
    "fewer-rows": on_tables(lambda t: [t[0].slice(0, 7), *t[1:]]),
    "fewer-groups": on_tables(lambda tables: tables[:-1]),
    "one-group": on_tables(lambda tables: [pa.concat_tables(tables)]),
    "groups-in-another-order": on_tables(lambda tables: tables[::-1]),
    "no-token": on_tables(lambda ts: [t.drop_columns(["token"]) for t in ts]),
    "no-expert": on_tables(lambda ts: [t.drop_columns(["expert"]) for t in ts]),
    "no-domain": on_tables(lambda ts: [t.drop_columns(["domain"]) for t in ts]),
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """`(trace, another of the same tokens)`; do not touch."""
    folder = tmp_path_factory.mktemp("traces")
    domains = ("prose", "code")
    return tuple(
        pages.write_trace(folder / f"{seed}.parquet", seed=seed, domains=domains)
        for seed in (0, 1)
    )


@pytest.fixture(scope="module")
def figures(traces):
    """What is said of the trace as it is, alone and beside the other."""
    return analysed(*traces)


def analysed(trace, other):
    outcomes = [
        moex("analyse", trace, "--json", seconds=SECONDS),
        moex("analyse", trace, f"--compare={other}", "--json", seconds=SECONDS),
        moex("analyse", other, f"--compare={trace}", "--json", seconds=SECONDS),
    ]
    return outcomes


@pytest.mark.parametrize("attack", some(TRACES, 6))
def test_a_crafted_trace_is_refused_or_gives_the_same(
    attack, traces, figures, tmp_path
):
    file = tmp_path / "crafted.parquet"
    shutil.copyfile(traces[0], file)
    attack(file)
    for outcome, expected in zip(analysed(file, traces[1]), figures, strict=True):
        check_no_traceback(outcome)
        if outcome.code != 0:
            check_refused(outcome, "crafted.parquet")
        else:
            found, right = (json.loads(o.out)["layers"] for o in (outcome, expected))
            assert found == right


# Logs.


@pytest.fixture(scope="module")
def logged(folder, tmp_path_factory):
    """A run directory that has nothing but logs; do not touch."""
    parent = tmp_path_factory.mktemp("logged")
    with pages.small_library():
        return pages.write_run(folder, parent / "run")


def line(**changes):
    """A line of metrics.jsonl among the others; `GONE` removes a field."""
    made = pages.train_line(215, 3.3) | changes
    return json.dumps({k: v for k, v in made.items() if v is not GONE})


FIGURES = {
    **{"null": None, "text": "x", "list": [1], "object": {}, "true": True},
    **{"huge": 10**400, "nan": float("nan"), "big": 1e308, "negative": -1},
    **{"gone": GONE},
}
EVIL = pages.EVIL
METRICS = {
    **{"empty-object": "{}", "null": "null", "list": "[]", "text": '"x"', "word": "x"},
    **{"deep": "[" * 100_000, "deep-in-line": '{"kind": ' + "[" * 100_000},
    **{"digits": '{"kind": "train", "step": ' + "9" * 5000 + "}"},
    **{"twice": '{"kind": "train", "step": 1, "step": 2}', "overflow": '{"a": 1e999}'},
    **{"bad-utf8": b'{"kind": "\xff", "step": 3}', "nul": "\0\0\0", "blank": "   "},
    **{"surrogate": '{"kind": "\\ud800", "step": 3}', "bom": "\ufeff" + line()},
    **{f"step-{n}": line(step=v) for n, v in FIGURES.items()},
    **{f"kind-{n}": line(kind=v) for n, v in FIGURES.items()},
    **{f"nll-{n}": line(nll=v) for n, v in FIGURES.items()},
    **{f"tokens-{n}": line(tokens_seen=v) for n, v in FIGURES.items()},
    **{f"seconds-{n}": line(**{"perf/step_s": v}) for n, v in FIGURES.items()},
    **{f"skipped-{n}": line(skipped=v) for n, v in FIGURES.items()},
    "flops-text": line(**{"perf/train_flops_per_token": "x"}),
    "name-evil": line(**{f"nll/{EVIL}": 1.0}),
    "kind-evil": line(kind=EVIL),
    "value-evil": line(loss=EVIL),
    "name-long": line(**{"x" * 1_000_000: 1.0}),
    "names-many": line(**{f"nll/{i}": 1.0 for i in range(20_000)}),
    "step-far": line(step=2**53),
    "sample-numbers": line(kind="sample", texts=[1]),
    "sample-text": line(kind="sample", texts=EVIL),
    "sample-null": line(kind="sample", texts=None),
    "sample-gone": line(kind="sample"),
    "eval-without": line(kind="eval", nll=GONE),
    "eval-text": line(kind="eval", nll="x"),
    "compile-text": line(kind="compile", seconds="x"),
}


def routed(label="001", **figures):
    """A line of routing.jsonl, with other figures of one layer."""
    made = pages.routing_line(215, pages.healthy(215))
    made["layers"][label] = made["layers"].get(label, {}) | figures
    return json.dumps(made)


LOADS = {
    **{"null": None, "text": "x", "texts": ["x", "y"], "number": 0.5, "empty": []},
    **{"object": {}, "nested": [[0.5], [0.5]], "ragged": [[0.5], 1], "long": [0.1] * 9},
    **{"nan": [float("nan")] * 4, "huge": [1e308] * 4, "negative": [-1.0] * 4},
    **{"deep": json.loads("[" * 500 + "]" * 500), "wide": [0.0] * 100_000},
}
ROUTING = {
    **{"null": "null", "list": "[]", "empty": "{}", "word": "x", "nul": "\0"},
    **{"deep": '{"kind": "train", "step": 5, "layers": ' + "[" * 100_000},
    **{"bad-utf8": b'{"kind": "\xff", "step": 5, "layers": {}}'},
    **{f"load-{name}": routed(load_frac=value) for name, value in LOADS.items()},
    **{f"violation-{n}": routed(max_violation=v) for n, v in LOADS.items()},
    **{f"label-{n}": routed(label=n) for n in ("", "x", "1", "-1", "1.2.3", EVIL)},
    **{"label-digits": routed(label="9" * 5000), "label-arabic": routed(label="١")},
    **{"layers-list": '{"kind": "train", "step": 5, "layers": []}'},
    **{"layers-null": '{"kind": "train", "step": 5, "layers": null}'},
    **{"layer-null": '{"kind": "train", "step": 5, "layers": {"001": null}}'},
    **{"no-layers": '{"kind": "train", "step": 5}'},
    **{"step-text": '{"kind": "train", "step": "5", "layers": {}}'},
    **{"step-list": '{"kind": "train", "step": [5], "layers": {}}'},
    **{"kind-list": '{"kind": ["train"], "step": 5, "layers": {}}'},
    "layers-many": json.dumps(
        {"kind": "train", "step": 5, "layers": {f"{i:03d}": {} for i in range(3000)}}
    ),
}
START = {"started": "2026-01-01", "step": 0, "packages": {}, "command": []}
ENVIRONMENT = {
    **{"nothing": "", "null": "null", "object": "{}", "text": '"x"', "number": "7"},
    **{"numbers": "[1, 2]", "lists": "[[]]", "empty": "[{}]", "nulls": "[null]"},
    **{"deep": "[" * 100_000, "digits": "[" + "9" * 5000 + "]", "cut": '[{"a": 1'},
    **{
        f"{name}-{what}": json.dumps([START | {name: value}])
        for name in ("started", "step", "command", "packages", "devices", "code")
        for what, value in {"null": None, "list": [{}], "evil": EVIL, "n": 7}.items()
    },
}
LOGS = {
    f"{file.split('.')[0]}-{name}": (file, text)
    for file, cases in {
        "metrics.jsonl": METRICS,
        "routing.jsonl": ROUTING,
        "environment.json": ENVIRONMENT,
    }.items()
    for name, text in cases.items()
}


def put(run, file, text):
    """A line in the middle of a log, or a file of this text."""
    made = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    path = run / file
    if file.endswith(".jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        made = b"".join([*lines[:20], made + b"\n", *lines[20:]])
    path.write_bytes(made)


def check_page(page):
    """Check that a page is whole, and that no text of a log runs in it."""
    text = page.read_text(encoding="utf-8")
    assert text.rstrip().endswith("</html>")
    assert "<b onload" not in text
    assert "window.evil=1</script>" not in text


def test_there_are_many_cases():
    assert len(TRACES) + len(LOGS) >= 80


@pytest.mark.parametrize("case", some(LOGS, 3))
def test_a_crafted_log_is_refused_by_name_or_gives_a_page(case, logged, tmp_path):
    file, text = case
    run, other = (shutil.copytree(logged, tmp_path / n) for n in ("run", "other"))
    put(run, file, text)
    page, plot = tmp_path / "page.html", tmp_path / "plot.html"
    commands = {page: ("report", run)}
    if file == "metrics.jsonl":
        commands[plot] = ("compare", run, other)
    for out, command in commands.items():
        with pages.small_library():
            outcome = moex(*command, f"--out={out}", seconds=SECONDS)
        check_no_traceback(outcome)
        if outcome.code != 0:
            check_refused(outcome, file)
            assert not out.exists()
        else:
            check_page(out)
    if file == "metrics.jsonl":
        command = ("compare", run, other, "--assert-equal")
        check_no_traceback(moex(*command, seconds=SECONDS))
