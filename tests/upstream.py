"""Reads the source of other packages."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any


def source(function: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def calls(function: Any) -> list[str]:
    """What a function calls, in the order of its source."""
    found = [node for node in ast.walk(source(function)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(node.func) for node in sorted(found, key=lambda n: (n.lineno, n.col_offset))
    ]
