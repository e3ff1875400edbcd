"""Count the plumbing in the core lessons: `python tests/plumbing.py` tags every code cell, and prints a share for each lesson.

Plumbing is what a learner of this subject need not read: imports, checks of arguments and what they raise, files and formats,
conversions to plain values and texts for a screen. A line counts as plumbing if it belongs to a statement of that kind, or to a
function whose name says that it is nothing else; a cell in which most lines do counts as a whole. `--cells` lists the tagged cells.
"""
import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "nbs").glob("0[0-6]_*.ipynb"))
MOST = 0.2  # of the code lines of a lesson
# Functions that check, convert, describe, read or write: all of their lines count.
NAMES = ("_check", "_interval", "__post_init__", "__repr__", "extra_repr", "_repr_png_", "to_dict", "from_dict", "save", "load", "record",
         "from_record", "to_pil", "_thumbnail", "named_loss", "loss_name", "state_dict", "load_state_dict")
# Modules and functions that have to do with files, formats, arguments and screens: a statement that calls one counts.
CALLS = {"open", "Path", "tempfile", "json", "os", "io", "shutil", "struct", "atomic_write", "read_checkpoint", "write_checkpoint",
         "read_scene", "write_scene", "checks", "print_exc"}


def called(node: ast.AST) -> set:
    "The first names of everything that a statement calls: json of json.dumps(x)."
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            name = part.func
            while isinstance(name, (ast.Attribute, ast.Call, ast.Subscript)):
                name = name.value if not isinstance(name, ast.Call) else name.func
            found |= {name.id} if isinstance(name, ast.Name) else set()
    return found


def is_plumbing(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Raise, ast.Try)):
        return True
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name.startswith(NAMES)
    if isinstance(node, ast.If):
        return all(isinstance(statement, ast.Raise) for statement in node.body) and not node.orelse
    return not hasattr(node, "body") and bool(called(node) & CALLS)


def plumbing_lines(tree: ast.AST) -> set:
    "Numbers of the lines of all statements that are plumbing."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and is_plumbing(node):
            found |= set(range(node.lineno, node.end_lineno + 1))
    return found


def code_lines(source: str) -> list:
    "Numbers of the lines that hold code: no blank lines, no comments, no directives of nbdev or IPython."
    lines = enumerate(source.splitlines(), 1)
    return [number for number, line in lines if line.strip() and not line.strip().startswith(("#", "%", "!"))]


def tagged(path: Path) -> list:
    "(id, lines of code, lines of plumbing) of every code cell."
    rows = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and (lines := code_lines(source)):
            plumbing = len(plumbing_lines(ast.parse(source)) & set(lines))
            rows.append((cell["id"], len(lines), len(lines) if plumbing > len(lines) / 2 else plumbing))
    return rows


def share(path: Path) -> float:
    "The share of plumbing among the lines of code of a lesson."
    rows = tagged(path)
    return sum(plumbing for _, _, plumbing in rows) / sum(lines for _, lines, _ in rows)


def main() -> int:
    for path in LESSONS:
        rows = tagged(path)
        cells = [name for name, lines, plumbing in rows if plumbing == lines]
        total, plumbing = sum(row[1] for row in rows), sum(row[2] for row in rows)
        print(f"{path.stem:<18}{plumbing:>5} of {total:>4} lines {share(path):>6.1%}   {len(cells):>3} of {len(rows):>3} cells")
        if "--cells" in sys.argv:
            print("   " + ", ".join(cells))
    return int(any(share(path) >= MOST for path in LESSONS))


if __name__ == "__main__":
    sys.exit(main())
