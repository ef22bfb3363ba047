"""Finds what messages of the package tell a person to type: commands, and `key=value` words."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokscale

PACKAGE = Path(tokscale.__file__).parent
KEY = r"[a-z_]+(?:\.[a-z_]+)*"
_TELLS = re.compile(
    rf"(?<!that )`tokscale (?P<command>[a-z-]+)[^`<]*`|"
    rf"\b(?:give|giving|set|use|by|with|choose|say|as|or|and|to|e\.g\.|see|one:)[ (]'?(?P<key>{KEY})=|"
    rf"(?:[;:,] |\()'?(?P<bare>{KEY})=(?!\{{)"
)
"""Words of advice with what to type behind them; `x={{value}} does not fit` alone only repeats what was given."""


@dataclass(frozen=True)
class Advice:
    """A message that says what to type."""

    where: str
    """Path below the package, and line."""
    text: str
    """With `{}` for what is filled in."""
    words: tuple[str, ...]
    """Stages and keys that it names."""
    fields: frozenset[str]
    """Keys of the class that it stands in, which does not know where it stands: `base.config` writes whole keys."""


def advice() -> Iterator[Advice]:
    """Every message of the package with advice in it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        fields: dict[ast.AST, frozenset[str]] = {}
        for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            lines = [line.target for line in owner.body if isinstance(line, ast.AnnAssign)]
            own = frozenset(target.id for target in lines if isinstance(target, ast.Name))
            fields |= dict.fromkeys(ast.walk(owner), own)
        for node, text in _texts(tree):
            if node in said or " " not in text.strip() or "</" in text or "\n\n" in text:
                continue
            words = tuple(m["command"] or m["key"] or m["bare"] for m in _TELLS.finditer(text))
            if words:
                where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
                yield Advice(where, text, words, fields.get(node, frozenset()))


def _texts(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node, node.value
