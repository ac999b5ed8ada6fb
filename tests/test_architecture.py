"""Rules of the house that a machine can check."""

import ast
import graphlib
import importlib
import pathlib
import re

import pytest
from flax import nnx

from moex.config.base import Config
from moex.nn.attention import Attention
from moex.nn.mla import LatentAttention
from moex.nn.rope import Yarn
from tests.helpers import tiny_lm

ROOT = pathlib.Path(__file__).parents[1]
# A package may import those to its right, and itself.
ORDER = ("experiments", "benchmarks", "configs", "launch", "moex", "kernels_pallas")
# Folders and modules of moex, from the lowest floor up. Each may import from its own
# floor, if no circle comes of it, and from those below.
FLOORS = (
    {"__init__", "numbers", "progress", "terminal"},
    {"config", "json_files", "project"},
    {"allocator", "cluster", "hints"},
    {"cache", "interrupts", "process"},
    {"data", "sharding"},
    {"nn"},
    {"moe"},
    {"adapters"},
    {"model"},
    {"tasks"},
    {"runs"},
    {"train"},
    {"analysis"},
    {"convert", "costs", "interop", "offload", "placement", "plan", "serve"},
    {"experiment", "report"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
# Imports that run up, to be mended: (file, imported module).
RUN_UP: set[tuple[str, str]] = set()
# What moex uses of nnx; transforms are JAX's own. See docs/decisions.
NNX_NAMES = {
    *("Dict", "List", "Module", "Param", "Rngs", "Variable"),
    *("eval_shape", "iter_modules", "merge", "split", "split_state", "state"),
    *("to_flat_state", "to_pure_dict"),
}
TEXT = {"", ".cfg", ".html", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yml"}


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path):
    """Top-level names of absolute imports, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package):
    forbidden = {"tests", *ORDER[: ORDER.index(package)]}
    for path in sources(package):
        wrong = forbidden & set(imported(path))
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def room(module: str) -> str:
    """The folder or module right below moex that holds a module of moex."""
    return (module.split(".") + ["__init__"])[1]


def modules_imported(path):
    """Dotted names of the modules of moex that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "moex":
                while not is_module(name):
                    name = name.rpartition(".")[0]
                yield name


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def arrows():
    """Yield (file, its room, module, its room) of every import from another room."""
    for path in sources("moex"):
        file = path.relative_to(ROOT)
        own = file.parts[1].removesuffix(".py")
        for module in modules_imported(path):
            if room(module) != own:
                yield file.as_posix(), own, module, room(module)


def test_imports_inside_moex_run_down():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    up = {(f, to) for f, own, to, its in arrows() if floor[its] > floor[own]}
    assert up - RUN_UP == set(), "an import from a higher floor"
    assert RUN_UP - up == set(), "mended: take it out of RUN_UP"


def test_no_circle_runs_through_the_rooms_of_moex():
    below = {name: set() for names in FLOORS for name in names}
    for file, own, module, its in arrows():
        if (file, module) not in RUN_UP:
            below[own].add(its)
    graphlib.TopologicalSorter(below).prepare()  # raises CycleError


def test_every_room_of_moex_has_a_floor():
    rooms = {path.relative_to(ROOT / "moex").parts[0] for path in sources("moex")}
    listed = [name for names in FLOORS for name in names]
    assert {name.removesuffix(".py") for name in rooms} == set(listed)
    assert len(listed) == len(set(listed))


def test_the_packages_are_there():
    assert sources("moex")
    assert sources("kernels_pallas")


def test_the_launcher_starts_moex_and_imports_nothing_of_it():
    assert sources("launch")
    for path in sources("launch"):
        assert not set(ORDER) & set(imported(path)), path


def test_kernels_do_not_import_flax():
    for path in sources("kernels_pallas"):
        assert "flax" not in imported(path), path


GRAPH_CALLS = {"split", "eval_shape", "iter_modules"}


def test_nothing_depends_on_the_graph_mode_of_nnx():
    """Which nobody but the user sets: every call that asks for it says it."""
    found = set()
    for path in sources("moex"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            func = getattr(node, "func", None)
            if getattr(getattr(func, "value", None), "id", "") != "nnx":
                continue
            if func.attr in GRAPH_CALLS:
                found.add(func.attr)
                words = {word.arg for word in node.keywords}
                assert "graph" in words, f"{path.relative_to(ROOT)}:{node.lineno}"
    assert found == GRAPH_CALLS


TEXT_CALLS = {"read_text", "write_text", "open", "fdopen"}


def opens_text_by_locale(node) -> bool:
    """Whether a call reads or writes text in an encoding that the machine decides."""
    if not isinstance(node, ast.Call):
        return False
    named = isinstance(node.func, ast.Attribute)
    name = node.func.attr if named else getattr(node.func, "id", "")
    given = {word.arg: word.value for word in node.keywords}
    if "encoding" in given:
        return False
    if "text" in given:  # of a subprocess
        return True
    owner = getattr(node.func.value, "id", "") if named else ""
    if name not in TEXT_CALLS or owner[:1].isupper():  # such as Trace.open
        return False
    if owner in ("os", "tarfile", "ts") and name == "open":  # not a file of text
        return False
    if name in ("read_text", "write_text"):
        return named
    first = 0 if named and owner not in ("os", "io", "gzip") else 1
    mode = given.get("mode", next(iter(node.args[first:]), ast.Constant("r")))
    return "b" not in getattr(mode, "value", "")


@pytest.mark.parametrize("package", ORDER)
def test_text_files_are_opened_in_an_encoding_that_is_named(package):
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not opens_text_by_locale(node), (
                f'{path.relative_to(ROOT)}:{node.lineno}: give encoding="utf-8"'
            )


@pytest.mark.parametrize(
    "code, wrong",
    [
        ("p.read_text()", True),
        ("(d / 'f').write_text(t)", True),
        ("open(f)", True),
        ("open(f, 'a')", True),
        ("p.open('w', newline='')", True),
        ("subprocess.run(c, text=True)", True),
        ("p.read_text(encoding='utf-8')", False),
        ("open(f, 'rb')", False),
        ("p.open(mode='wb')", False),
        ("os.fdopen(n, 'wb')", False),
        ("Trace.open(f)", False),
        ("write_text(run, prompts)", False),
    ],
)
def test_text_without_an_encoding_is_seen(code, wrong):
    assert opens_text_by_locale(ast.parse(code).body[0].value) == wrong


def test_only_the_agreed_part_of_nnx_is_used():
    for path in sources("moex"):
        text = path.read_text()
        used = set(re.findall(r"\bnnx\.([A-Za-z_]+)", text))
        assert used <= NNX_NAMES, f"{path.relative_to(ROOT)}: {used - NNX_NAMES}"
        assert ".sow(" not in text, path


def walk_modules(node, path=""):
    """Every `(path, value)` under a module, through lists and dicts."""
    yield path, node
    if isinstance(node, nnx.List | list | tuple):
        items = enumerate(node)
    elif isinstance(node, nnx.Module):
        items = vars(node).items()
    elif isinstance(node, dict):
        items = node.items()
    else:
        return
    for name, child in items:
        yield from walk_modules(child, f"{path}/{name}")


LATENT = LatentAttention(heads=2, kv_latent=4, nope_dim=2, rope_dim=2, v_dim=2)


SCALING = Yarn(factor=2.0, original=16)
SCALED = Attention(heads=4, rope_scaling=SCALING)


@pytest.mark.parametrize("fields", [{}, {"attention": LATENT}, {"attention": SCALED}])
def test_no_module_keeps_a_config(fields):
    model = nnx.eval_shape(lambda: tiny_lm(**fields).make(nnx.Rngs(params=0)))
    seen = dict(walk_modules(model))
    assert any(path.endswith("router/w_DE") for path in seen)
    for path, value in seen.items():
        assert not isinstance(value, Config), path


def pins(file):
    """{name: line} of a constraints file, by the first line of a name."""
    lines = (ROOT / file).read_text().splitlines()
    return {
        re.split("[=; ]", line)[0].lower().replace("_", "-"): line
        for line in lines
        if not line.startswith("#")
    }


def test_the_pins_of_the_hf_extras_are_exact_and_add_to_the_others():
    """`make test-hf` gives both files to pip, which refuses two pins of one name."""
    ours, theirs = pins("constraints.txt"), pins("constraints-hf.txt")
    assert {"torch", "transformers", "lm-eval"} <= theirs.keys()
    assert not ours.keys() & theirs.keys()
    for line in theirs.values():  # no URL, no "+cpu" of one index
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line
    assert "--constraint constraints-hf.txt" in (ROOT / "Makefile").read_text()


# First words that leave a docstring without a subject. "Same as" may stand for "As".
NO_SUBJECT = {"As", "Not", "Nothing", "Of", "Or", "That", "Those", "What"}


def first_words(text):
    """Yield (line number, first word) of every docstring in the text of a module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds) and (told := ast.get_docstring(node)):
            yield node.body[0].lineno, re.split(r"\W", told)[0]


@pytest.mark.parametrize("package", ORDER)
def test_docstrings_begin_with_a_subject_or_a_verb(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: begins with {word!r}"
        for path in sources(package)
        for line, word in first_words(path.read_text(encoding="utf-8"))
        if word in NO_SUBJECT
    ]
    assert not wrong, "\n".join(wrong)


def test_first_words_of_docstrings_are_found():
    text = '"""Of a module."""\nclass C:\n    def f():\n        """What: f."""\n'
    assert list(first_words(text)) == [(1, "Of"), (4, "What")]


def test_no_file_names_a_package_registry():
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"))]
    hosts += ["index" + "-url", ".".join(("download", "pytorch", "org"))]
    hidden = {".git", ".venv", "__pycache__", "build", "dist", "node_modules"}
    for path in ROOT.rglob("*"):
        parts = set(path.relative_to(ROOT).parts)
        if parts & hidden or path.suffix not in TEXT or not path.is_file():
            continue
        if path.stat().st_size > 1_000_000:
            continue
        text = path.read_text(errors="ignore")
        for host in hosts:
            assert host not in text, f"{path.relative_to(ROOT)} names {host}"


@pytest.mark.parametrize("package", ["experiments", "benchmarks", "configs", "tests"])
def test_names_that_scripts_import_from_moex_are_there(package):
    """Scripts that no default test runs break unseen when a name moves."""
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                continue
            if node.module.split(".")[0] not in ("moex", "kernels_pallas"):
                continue
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                there = hasattr(module, name) or is_module(f"{node.module}.{name}")
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert there, f"{where}: {node.module} has no {name}"
