"""The configs that come with moex: the folder `configs`, installed as `moex.configs`.

In the repository `moex/configs` is a link to that folder.
"""

import ast
import pathlib

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
# What `moex init` copies, from the folder `template` there.
TEMPLATE = ("README.md", "config.py", "router.py", "test_router.py")


def shipped() -> dict[str, pathlib.Path]:
    """The files of the configs that are runs, by the names for `--config`, sorted."""
    files = [f for f in sorted(FOLDER.glob("*.py")) if f.stem != "base"]
    return {f.stem: f for f in files if "\ndef get_config(" in _text(f)}


def about(file: pathlib.Path) -> str:
    """The first line of a config file's docstring."""
    return (ast.get_docstring(ast.parse(_text(file))) or "").partition("\n")[0]


def _text(file: pathlib.Path) -> str:
    return file.read_text(encoding="utf-8")
