"""Measure the size and the plainness of ftclip.py.

    python benchmarks/count.py [ftclip.py]

A token of code is what Python's tokenizer calls a name, number, operator or string, on a line that
has more than strings. So docstrings, comments and line breaks do not count.

The branches of a function are its if, elif, for, while, except, and, or, conditional expressions,
the `for` and `if` of comprehensions, and the cases of a match. `a and b and c` counts twice.
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path

# Tokens for each part, as planned. Those of all parts are 9,500 at most.
BUDGET = {
    "docstring, imports": 120,
    "configuration": 1100,
    "model": 1600,
    "optimization": 550,
    "augmentation": 1000,
    "data": 750,
    "training": 1900,
    "the program": 1700,
}
KINDS = (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING)
ONE_BRANCH = (
    ast.If,
    ast.For,
    ast.While,
    ast.ExceptHandler,
    ast.IfExp,
    ast.comprehension,
    ast.match_case,
)


def token_lines(source: str) -> list[int]:
    """The line of each token of code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    tokens = [token for token in tokens if token.type in KINDS]
    code = {token.start[0] for token in tokens if token.type != tokenize.STRING}
    return [token.start[0] for token in tokens if token.start[0] in code]


def parts_of(lines: list[str]) -> list[tuple[str, int, int]]:
    """Name, first and last line of each part. A part begins with `# ------ its name`."""
    starts = [(1, "docstring, imports")]
    for number, line in enumerate(lines, 1):
        if line.startswith("# -----"):
            starts.append((number, line.strip("#- ")))
    ends = [number - 1 for number, _ in starts[1:]] + [len(lines)]
    return [(name, first, last) for (first, name), last in zip(starts, ends)]


def branches(function: ast.FunctionDef) -> int:
    """Number of branches, as the docstring of this file defines them."""
    total = 0
    for node in ast.walk(function):
        if isinstance(node, ONE_BRANCH):
            total += 1
        if isinstance(node, ast.comprehension):
            total += len(node.ifs)
        if isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent.parent / "ftclip.py"
    parser.add_argument("file", nargs="?", type=Path, default=default)
    parser.add_argument("--top", type=int, default=8, help="number of functions to list")
    args = parser.parse_args()
    source = args.file.read_text()
    lines = source.splitlines()
    nodes = list(ast.walk(ast.parse(source)))
    tokens = token_lines(source)

    def count(first: int, last: int) -> int:
        return sum(first <= line <= last for line in tokens)

    print(f"{'part':20} {'tokens':>7} {'budget':>7} {'lines':>7}")
    for name, first, last in parts_of(lines):
        size = count(first, last)
        print(f"{name:20} {size:7,} {BUDGET.get(name, 0):7,} {last - first + 1:7,}")
    print(f"{'all':20} {len(tokens):7,} {9500:7,} {len(lines):7,}")
    print(f"tokens per line of code: {len(tokens) / len(set(tokens)):.1f} (at most 10.5)")

    tuples = 0
    nested = 0
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            tuples += any(isinstance(target, ast.Tuple) for target in node.targets)
        if isinstance(node, ast.IfExp):
            inner = [child for child in ast.walk(node) if isinstance(child, ast.IfExp)]
            nested += len(inner) > 1
    print(f"tuple-to-tuple assignments: {tuples}")
    print(f"lambdas: {sum(isinstance(node, ast.Lambda) for node in nodes)}")
    print(f"nested conditional expressions: {nested}")
    print(f"walrus: {sum(isinstance(node, ast.NamedExpr) for node in nodes)}")
    print(f"noqa: {source.count('noqa')}")
    print(f"lines over 100 columns: {sum(len(line) > 100 for line in lines)}")

    class_of = {}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                class_of[child] = f"{node.name}."
    rows = []
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            name = class_of.get(node, "") + node.name
            length = node.end_lineno - node.lineno + 1
            rows.append((name, count(node.lineno, node.end_lineno), length, branches(node)))
    print(f"most branches, of {len(rows)} functions:")
    for name, size, length, number in sorted(rows, key=lambda row: -row[3])[: args.top]:
        print(f"  {name:28} {number:3} branches {length:4} lines {size:5} tokens")
    print("longest functions:")
    for name, size, length, number in sorted(rows, key=lambda row: -row[2])[: args.top]:
        print(f"  {name:28} {number:3} branches {length:4} lines {size:5} tokens")


if __name__ == "__main__":
    main()
