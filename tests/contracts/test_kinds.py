"""A kind is never added half: wherever kinds are told apart all are named, and one more fails here or at import.

Kinds are the classes of a union of configurations, told apart in YAML by `kind`, and the values of a `Literal`. A
branch "for all others" would take an added kind for the last one, and compute something else without a word. What is
left to look at one kind alone is written down here, with the reason.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for name in ("tokscale", "launch")
    for path in sorted((ROOT / name).rglob("*.py"))
}
NOTHING_CHOSEN = {"auto", "none"}
"""Values that stand for no choice; to ask for one is not to tell kinds apart."""
ALONE = {"tokscale/bench/race.py DiscreteVAEConfig": "the original that it races has this one alone"}
"""Places that look at one kind of a union, `file Class`, and why a new kind belongs with the others there."""
ONE_OF_MANY = {
    "tokscale/bench/attention.py config.dtype == 'float32'": "the originals are measured in this one alone",
    "tokscale/bench/acceptance/device.py backend != 'sdpa'": "that one computes every kind of attention",
    "tokscale/data/raw/files.py error.reason not in ('caption_missing', 'caption_empty')": "an image may do without",
    "tokscale/data/tokenization/inputs.py error.reason in ('caption_missing', 'caption_empty')": "as above",
    "tokscale/data/tokenization/work.py entry.reason != 'quality'": "what a filter left out was asked for",
    "tokscale/nn/attention/backend.py backend_override in ('dense', 'sdpa')": "only the oracles read masks of keys",
    "tokscale/nn/attention/backend.py backend_override != 'flex'": "full attention needs no pattern, but may be timed",
}
"""Comparisons with one of three values or more, and why a new value belongs with the others there."""


@cache
def unions() -> list[frozenset[str]]:
    """The names of the classes that may stand in one place of a configuration: unions, and what a registry holds."""
    found: dict[str, frozenset[str]] = {}
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Subscript) and "Field(discriminator='kind')" in ast.unparse(node.slice):
                assert isinstance(node.slice, ast.Tuple)
                found[f"{path}:{node.lineno}"] = names(node.slice.elts[0])
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "config_class":
                folder = "/".join(path.split("/")[:2])
                found[folder] = found.get(folder, frozenset()) | names(node.value)
            elif isinstance(node, ast.ClassDef) and "AnyOptimizerConfig" in map(ast.unparse, node.bases):
                found["optimizers"] = found.get("optimizers", frozenset()) | {node.name}
    return list(found.values())


@cache
def literals() -> dict[str, dict[frozenset[str], set[str]]]:
    """The values of every `Literal` and the files that say so, by the names of fields, arguments and aliases."""
    found: dict[str, dict[frozenset[str], set[str]]] = defaultdict(lambda: defaultdict(set))
    named: list[tuple[str, str, ast.expr]] = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            match node:
                case ast.AnnAssign(target=ast.Name(id=name) | ast.Attribute(attr=name), annotation=annotation):
                    named.append((path, name, annotation))
                case ast.arg(arg=name, annotation=ast.expr() as annotation):
                    named.append((path, name, annotation))
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() as value):
                    named.append((path, name, value))
    aliases = {
        name: values
        for _, name, annotation in named
        if isinstance(annotation, ast.Subscript)
        and ast.unparse(annotation.value) == "Literal"
        and (values := strings(annotation.slice))
    }
    for path, name, annotation in named:
        for part in ast.walk(annotation):
            if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "Literal":
                found[name][strings(part.slice)].add(path)
            elif isinstance(part, ast.Name) and part.id in aliases and part.id != name:
                found[name][aliases[part.id]].add(path)
    return found


def literals_of(path: str, node: ast.expr) -> list[frozenset[str]]:
    """What an expression may be: an attribute as any class has it, a plain name as its own file says."""
    sets = literals().get(last_name(node), {})
    return [
        values
        for values, files in sets.items()
        if len(values) > 1 and (isinstance(node, ast.Attribute) or path in files)
    ]


def names(node: ast.AST) -> frozenset[str]:
    return frozenset(part.id for part in ast.walk(node) if isinstance(part, ast.Name))


def strings(node: ast.AST) -> frozenset[str]:
    parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return frozenset(part for part in parts if isinstance(part, str))


def nodes(kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield path, node


def test_the_unions_are_found():
    assert {len(kinds) for kinds in unions()} >= {2, 3, 4, 6} and len(unions()) == 9, unions()


def last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_every_match_says_what_happens_to_all_others():
    """With `case _`: an error for what comes from outside, `assert_never` where all kinds are named."""
    left_open = [
        f"{path}:{node.lineno}"
        for path, node in nodes(ast.Match)
        if isinstance(node, ast.Match)
        and not (isinstance(last := node.cases[-1].pattern, ast.MatchAs) and last.pattern is None and last.name is None)
    ]
    assert left_open == []


def test_a_match_that_expects_nothing_else_names_every_kind():
    short = []
    for path, node in nodes(ast.Match):
        assert isinstance(node, ast.Match)
        *cases, last = node.cases
        if "assert_never" not in ast.unparse(last):
            continue
        patterns = [pattern for case in cases for pattern in ast.walk(case.pattern)]
        classes = {last_name(p.cls) for p in patterns if isinstance(p, ast.MatchClass)}
        values = {v for p in patterns if isinstance(p, ast.MatchValue) for v in strings(p)}
        known = set(literals().get(last_name(node.subject), ())) if values else set(unions())
        known = {kinds for kinds in known if kinds & (classes | values)}
        # Of several literals of one name the widest is meant: another configuration may allow fewer.
        known = {max(known, key=len)} if values and known else known
        if not known or any(kinds != (classes | values) for kinds in known):
            lacking = sorted(set().union(*known) - classes - values) or "no union and no Literal of this name"
            short.append(f"{path}:{node.lineno} match {ast.unparse(node.subject)}: {lacking}")
    assert short == []


def test_no_place_asks_for_one_class_of_a_union():
    """What differs between kinds is a method or an attribute that each has to have."""
    kinds, found = set().union(*unions()), set()
    for path, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        if last_name(node.func) == "isinstance":
            found |= {f"{path} {name}" for name in names(node.args[1]) & kinds}
    assert found == set(ALONE)


def test_no_place_compares_a_kind():
    found = [
        f"{path}:{node.lineno} {ast.unparse(node)}"
        for path, node in nodes(ast.Compare)
        if isinstance(node, ast.Compare)
        and any(
            ast.unparse(side).endswith((".kind", "['kind']", "get('kind')")) for side in (node.left, *node.comparators)
        )
        and strings(node) - {"kind", "drops"}  # the log of failed units has kinds of entries, which are none of these
    ]
    assert found == []


def test_one_of_three_values_or_more_is_not_told_from_the_rest():
    """Of two values one may be asked for: what is not the one is the other, until a third comes and this fails."""
    found = set()
    for path, node in nodes(ast.Compare):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = frozenset().union(*(strings(side) for side in sides)) - NOTHING_CHOSEN
            kept = sides[:1] if isinstance(node.ops[0], ast.In | ast.NotIn) else sides
            for side in kept:
                known = [values - NOTHING_CHOSEN for values in literals_of(path, side) if values & asked]
                if known and min(map(len, known)) > 2:
                    found.add(f"{path} {ast.unparse(node)}")
    assert found == set(ONE_OF_MANY)
