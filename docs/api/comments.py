"""The meaning of fields: a config says it in the comment beside each."""

import ast
import inspect
import io
import itertools
import textwrap
import tokenize


def of_fields(cls: type) -> dict[str, str]:
    """The comments of the fields of a class: those behind a field, else those above."""
    source = textwrap.dedent(inspect.getsource(cls))
    behind, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            code = token.line[: token.start[1]].strip()
            (behind if code else alone)[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            lines = range(node.lineno, node.end_lineno + 1)
            above = itertools.takewhile(alone.get, range(node.lineno - 1, 0, -1))
            told = [behind[n] for n in lines if n in behind]
            told = told or [alone[n] for n in reversed([*above])]
            if told:
                found[node.target.id] = " ".join(told)
    return found
