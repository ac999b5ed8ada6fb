"""Classes of a user's own: found in the project folder, and nowhere else."""

import importlib
import json
import sys

import pytest
from ml_collections import ConfigDict

from moex import cli, commands, project
from moex.config.base import ConfigError, check, from_dict, own_files, to_dict
from moex.config.flags import load_config
from moex.config.reopen import check_reopens

ROUTER = """
import dataclasses
from moex.config.base import Config

@dataclasses.dataclass(kw_only=True, slots=True)
class Own(Config):
    k: int = 1
"""
CONFIG = """
from ml_collections import ConfigDict
from {module} import Own

def get_config():
    return ConfigDict({{"own": Own(k=3)}}, convert_dict=False)
"""


@pytest.fixture(autouse=True)
def clean_imports(monkeypatch):
    """No module of a test is there in the next one."""
    project.use(None)
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]
    sys.path[:] = path
    project.use(None)


def write(folder, name, text=ROUTER):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_class_beside_the_config_file_is_found_again(tmp_path, monkeypatch):
    write(tmp_path, "own_router.py")
    file = write(tmp_path, "config.py", CONFIG.format(module="own_router"))
    cfg = load_config([f"--config={file}"])
    assert own_files(cfg) == [tmp_path / "own_router.py"]
    data = to_dict(cfg)
    assert data["own"] == {"__config__": "own_router.Own", "k": 3}
    project.use(None)  # the next command is not told of the config file
    del sys.modules["own_router"]
    with pytest.raises(ConfigError, match=r"own_router.Own.*--project=FOLDER"):
        from_dict(data)
    project.use(tmp_path)
    assert from_dict(data).own.k == 3
    project.use(None)
    monkeypatch.chdir(tmp_path)
    assert from_dict(data).own.k == 3


@pytest.mark.parametrize("package", [True, False])
def test_a_class_in_a_folder_of_the_project_is_found(tmp_path, package):
    write(tmp_path, "own_pieces/router.py")
    if package:
        write(tmp_path, "own_pieces/__init__.py", "")
    project.use(tmp_path)
    assert from_dict({"__config__": "own_pieces.router.Own", "k": 2}).k == 2


def test_a_class_in_the_config_file_itself_is_refused(tmp_path):
    text = CONFIG.replace("from {module} import Own", ROUTER).format()
    file = write(tmp_path, "config.py", text)
    with pytest.raises(ConfigError, match=r"config.own: Own is defined in the config"):
        load_config([f"--config={file}"])


FIELDS = """
import dataclasses, enum, pathlib
from moex.config.base import Config

class Color(enum.Enum):
    RED = "red"

class Word(enum.StrEnum):
    RED = "red"

class Outside:
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Inside(Config):
        a: int = 1

@dataclasses.dataclass(kw_only=True, slots=True)
class Doubled(Config):
    value: int = 1
    def __post_init__(self):
        self.value *= 2

@dataclasses.dataclass(kw_only=True, slots=True)
class One(Config):
    value: {kind} = {value}
"""


def own_config(folder, kind="int", value="1", name="One"):
    """A config with an own class that has one field."""
    module = f"own_fields_{len(list(folder.iterdir()))}"
    write(folder, f"{module}.py", FIELDS.format(kind=kind, value=value))
    project.use(folder)
    found = vars(importlib.import_module(module))
    cls = found["Outside"].Inside if name == "Inside" else found[name]
    return ConfigDict({"own": cls()}, convert_dict=False)


@pytest.mark.parametrize(
    "kind, value, says",
    [
        ("pathlib.Path", "pathlib.Path('a')", r"Path\('a'\): must be a number, text"),
        ("set", "dataclasses.field(default_factory=lambda: {1})", "= .1.: must be a"),
        ("Color", "Color.RED", "Color.RED.*must be a number, text"),
        ("Word", "Word.RED", "must be Word, not str. So it would be read from config"),
        (
            "int",
            "dataclasses.field(init=False, default=2)",
            "= 2: must be a field",
        ),
        (
            "dict",
            "dataclasses.field(default_factory=lambda: {1: 2})",
            "key = 1: ",
        ),
    ],
)
def test_a_value_that_is_not_read_back_is_refused(
    tmp_path, monkeypatch, kind, value, says
):
    monkeypatch.syspath_prepend(tmp_path)
    cfg = own_config(tmp_path, kind, value)
    check(cfg)
    with pytest.raises(ConfigError, match=f"^config.own.value.*{says}"):
        check_reopens(cfg)


@pytest.mark.parametrize(
    "name, says",
    [
        ("Inside", "config.own: Outside.Inside is defined inside of something else"),
        ("Doubled", "config.own.value = 2: must be kept: the value would be 4 when"),
    ],
)
def test_a_class_that_is_not_read_back_is_refused(tmp_path, monkeypatch, name, says):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"^{says}"):
        check_reopens(own_config(tmp_path, name=name))


def test_a_class_of_a_notebook_is_refused():
    names = {"__name__": "__main__"}
    exec(ROUTER, names)
    cfg = ConfigDict({"own": names["Own"]()}, convert_dict=False)
    with pytest.raises(ConfigError, match="Own is defined in the program that runs; p"):
        check_reopens(cfg)


def test_lists_are_read_back_as_lists(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    value = "dataclasses.field(default_factory=lambda: ['a', 'b'])"
    for kind in ("list[str]", "list[str] | None"):
        cfg = own_config(tmp_path, kind, value)
        check_reopens(cfg)
        assert from_dict(json.loads(json.dumps(to_dict(cfg)))).own == cfg.own


def test_training_and_sweeps_refuse_before_they_start(tmp_path, monkeypatch, capsys):
    text = (
        "from moex.configs import quickstart\n"
        "from own_sub import Sub\n\n\n"
        "def get_config():\n"
        "    cfg = quickstart.get_config()\n"
        "    moe = cfg.model.layers[0].pattern[0]\n"
        "    moe.router = Sub(k=2)\n"
        "    return cfg\n"
    )
    sub = (
        "import dataclasses, pathlib\n"
        "from moex.moe.routers.topk import TopK\n\n\n"
        "@dataclasses.dataclass(kw_only=True, slots=True)\n"
        "class Sub(TopK):\n"
        "    table: pathlib.Path = pathlib.Path('table')\n"
    )
    write(tmp_path, "own_sub.py", sub)
    file = write(tmp_path, "config.py", text)
    for more in ([], ["--dry-run"], ["--sweep", "seed=0,1"]):
        workdir = tmp_path / "run"
        with pytest.raises(SystemExit) as end:
            cli.main(["train", f"--config={file}", f"--workdir={workdir}", *more])
        assert end.value.code == 2 and not workdir.exists()
        error = capsys.readouterr().err
        assert "router.table = PosixPath('table'): must be a number, text" in error


def test_a_class_from_outside_of_the_project_folder_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "elsewhere", "own_far.py")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    file = write(tmp_path / "here", "config.py", CONFIG.format(module="own_far"))
    with pytest.raises(ConfigError, match=r"config.own: 'own_far.Own' is not a config"):
        load_config([f"--config={file}"])


def test_no_installed_module_is_imported_for_a_run(tmp_path, monkeypatch):
    """`this` prints when it is imported, and `own_installed` would leave a mark."""
    mark = tmp_path / "mark"
    text = f"open({str(mark)!r}, 'w').close()" + ROUTER
    write(tmp_path / "installed", "own_installed.py", text)
    # A regular package goes before a folder without __init__.py in Python's own order.
    write(tmp_path / "installed", "own_pack/__init__.py", text)
    write(tmp_path / "project", "own_pack/router.py")
    monkeypatch.syspath_prepend(tmp_path / "installed")
    project.use(tmp_path / "project")
    for tag in ("own_installed.Own", "this.Own", "own_pack.Own", "..own_pack.Own"):
        with pytest.raises(ConfigError, match="is not a config class of moex"):
            from_dict({"__config__": tag})
    assert from_dict({"__config__": "own_pack.router.Own"}).k == 1
    assert not mark.exists() and "this" not in sys.modules


def test_a_module_of_the_project_with_the_name_of_another_is_refused(tmp_path):
    write(tmp_path, "json.py")
    project.use(tmp_path)
    with pytest.raises(ConfigError, match=r"json.py has the name of another module"):
        from_dict({"__config__": "json.Own"})


def test_what_the_module_raises_is_one_line_that_names_it(tmp_path):
    write(tmp_path, "own_broken.py", "import own_nothing")
    project.use(tmp_path)
    with pytest.raises(ConfigError, match=r"own_broken.py cannot be imported: Module"):
        from_dict({"__config__": "own_broken.Own"}, "config.model")
    assert "own_broken" not in sys.modules


@pytest.mark.parametrize("where", ["", "inside/"])
@pytest.mark.parametrize("named", ["__config__", "\\u005f_config__"])
def test_nothing_in_a_run_directory_is_code(tmp_path, monkeypatch, where, named):
    text = f"open({str(tmp_path / 'mark')!r}, 'w').close()" + ROUTER
    write(tmp_path, f"run/{where}own_evil.py", text)
    write(tmp_path, "run/config.json", f'{{"{named}": "own_evil.Own"}}')
    for folder, tag in (
        (tmp_path / "run" / where, "own_evil.Own"),
        (tmp_path, f"run.{where.replace('/', '.')}own_evil.Own"),
    ):
        monkeypatch.chdir(folder)
        with pytest.raises(ConfigError, match="lies in the run directory"):
            from_dict({"__config__": tag})
    assert not (tmp_path / "mark").exists()


def test_only_config_classes_are_built(tmp_path):
    write(tmp_path, "own_things.py", ROUTER + "class Other: pass\ndef make(): pass\n")
    project.use(tmp_path)
    for name in ("Other", "make", "dataclasses", "Nothing"):
        with pytest.raises(ConfigError, match="is not a config class"):
            from_dict({"__config__": f"own_things.{name}"})


def test_every_command_has_the_flag(tmp_path, capsys):
    for name in commands.names():
        with pytest.raises(SystemExit) as end:
            cli.main([name, "--help"])
        assert end.value.code == 0
        assert "--project FOLDER" in capsys.readouterr().out
    run = tmp_path / "run"
    write(run, "config.json", json.dumps({"seed": {"__config__": "own_a.B"}}))
    with pytest.raises(SystemExit) as end:
        cli.main(["report", str(run), f"--project={tmp_path / 'none'}"])
    assert end.value.code == 2
    assert "--project: there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["report", str(run), f"--project={tmp_path}"])
    error = capsys.readouterr().err
    assert "config.seed: 'own_a.B' is not a config class of moex, nor one" in error
    assert f"project folder {tmp_path}" in error and "--project=FOLDER" in error
