"""Make the API reference from docstrings: `make docs`.

pdoc does it. This file chooses the modules, writes the page of `moex` itself, whose
names lie in other modules, and gives fields of configs the comments beside them.
"""

import argparse
import importlib
import inspect
import itertools
import pathlib
import re

import comments  # beside this file
import pdoc
import pdoc.doc_ast
import pdoc.render

import moex

# Modules without a public name that a reader of the others needs.
MORE = (
    "moex.configs.base",
    "moex.model.spec",
    "moex.moe.losses",
    "moex.moe.metrics",
    "moex.nn.rope",
)
# The module in which JAX defines its arrays, whose public name is `jax.Array`; pages
# have tags between its words.
INSIDE = re.compile(r"jaxlib(<[^>]*>)*\.(<[^>]*>)*_jax(<[^>]*>)*\.(<[^>]*>)*")


def read_comments() -> None:
    """Let pdoc take the comments of fields for their docstrings."""
    walk = pdoc.doc_ast.walk_tree

    def walk_with_comments(thing):
        found = walk(thing)
        if isinstance(thing, type) and thing.__module__.startswith("moex."):
            for name, text in comments.of_fields(thing).items():
                found.var_docstrings.setdefault(name, text)
        return found

    pdoc.doc_ast.walk_tree = walk_with_comments


def overview(modules: list[str]) -> str:
    """The page of moex: its public names, and modules without one, by package."""
    lines = []
    for package, names in itertools.groupby(modules, lambda m: m.split(".")[1]):
        lines += [f"## moex.{package}", "", "| name | module | |", "|---|---|---|"]
        for module in names:
            page = module.replace(".", "/") + ".html"
            link = f"[{module}]({page})"
            if module not in moex.PUBLIC:
                about = first_sentence(importlib.import_module(module))
                lines.append(f"| | {link} | {about} |")
            for name in moex.PUBLIC.get(module, "").split():
                about = first_sentence(getattr(moex, name))
                lines.append(f"| [`{name}`]({page}#{name}) | {link} | {about} |")
        lines.append("")
    return "\n".join(lines)


def first_sentence(thing: object) -> str:
    """The first sentence of a docstring, on one line."""
    text = " ".join((inspect.getdoc(thing) or "").split())
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0].replace("|", r"\|")


def main() -> None:
    """Read the command line and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the pages go")
    folder = parser.parse_args().folder
    read_comments()
    modules = sorted({*moex.PUBLIC, *MORE})
    moex.__doc__ += "\n" + overview(modules)
    moex.__all__ = []  # its page has the table instead
    pdoc.render.configure(
        docformat="google",
        show_source=False,
        footer_text=f"moex {moex.__version__}",
        template_directory=pathlib.Path(__file__).parent,
    )
    named = "|".join(map(re.escape, ["moex", *modules]))
    pdoc.pdoc("moex", *modules, f"!(?!(?:{named})$)", output_directory=folder)
    for page in folder.rglob("*.html"):
        text = INSIDE.sub("", page.read_text(encoding="utf-8"))
        page.write_text(text, encoding="utf-8")
    print(f"{folder / 'moex.html'}: {len(modules)} modules")


if __name__ == "__main__":
    main()
