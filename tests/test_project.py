"""What holds for the project as a whole: the order of the lessons, the notebooks, the package's surface, the files at the top.

Most of it reads source text; only two tests import the package, in an interpreter of their own.
"""
import ast
import configparser
import graphlib
import html
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import plumbing
import readme

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb")) + sorted((ROOT / "nbs" / "workshop").glob("*.ipynb"))
NOT_LESSONS = {"__init__", "_modidx"}  # the package's front doors, and nbdev's index of names


def module_name(path: Path) -> str:
    "The dotted name of a module file inside the package: gs2d/io/files.py is io.files."
    return ".".join(path.relative_to(ROOT / "gs2d").with_suffix("").parts)


MODULES = sorted(path for path in (ROOT / "gs2d").rglob("*.py") if path.stem not in NOT_LESSONS)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_module = pytest.mark.parametrize("path", MODULES, ids=module_name)


# --- reading notebooks ----------------------------------------------------------------------------


def cells(path: Path, kind: str = None) -> list:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if kind in (None, cell["cell_type"])]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def outputs(path: Path) -> list:
    "(id of the cell, output) of every output of a notebook."
    return [(cell["id"], output) for cell in cells(path, "code") for output in cell["outputs"]]


def exported_modules(path: Path) -> list:
    "The modules that a notebook exports to: its default one first, then those that single cells name."
    found = []
    for cell in cells(path, "code"):
        found += re.findall(r"^#\|\s*(?:default_exp|exporti?)[ \t]+([\w.]+)[ \t]*$", source(cell), re.MULTILINE)
    return list(dict.fromkeys(found))


# --- the lessons and their modules ----------------------------------------------------------------


def test_every_module_has_one_notebook():
    assert sorted(name for path in NOTEBOOKS for name in exported_modules(path)) == sorted(map(module_name, MODULES))


def imported_from_gs2d(tree: ast.AST, module: str) -> set:
    "Dotted names, below gs2d, of everything that the module of this name imports, wherever in the file; \"\" is the package itself."
    package = ["gs2d", *module.split(".")[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            whole = {f"{origin}.{alias.name}" for alias in node.names}  # `from .kernels import vectors` names a module
            found |= whole if origin == "gs2d" or whole & KNOWN else {origin}
    return {name.removeprefix("gs2d").lstrip(".") for name in found if name.split(".")[0] == "gs2d"} - {"__version__"}


KNOWN = {f"gs2d.{module_name(path)}" for path in MODULES}
DOOR = "kernels.operators"  # it names other modules in a table of strings, to import them at first use


def import_graph() -> dict:
    "Module -> the modules that it imports, by name."
    return {module_name(path): imported_from_gs2d(ast.parse(path.read_text(encoding="utf-8")), module_name(path)) for path in MODULES}


def test_no_import_runs_in_a_circle_and_none_takes_the_front_door():
    graph = import_graph()
    assert {name: sorted(others - graph.keys()) for name, others in graph.items() if others - graph.keys()} == {}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_no_folder_imports_what_stands_on_it():
    "A folder is one room: what its modules import lies below all of them."
    graph, rooms = import_graph(), {}
    for name, others in graph.items():
        room = name.split(".")[0]
        rooms.setdefault(room, set()).update({other.split(".")[0] for other in others} - {room})
    tuple(graphlib.TopologicalSorter(rooms).static_order())  # CycleError names the circle


MOST_LINES, LONGEST_LINE = 360, 120


@each_module
def test_rooms_are_small_and_lines_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    generated = [k for k, line in enumerate(lines) if line.startswith("__all__")]  # nbdev wraps it as it likes
    assert len(lines) <= MOST_LINES
    assert [line for k, line in enumerate(lines) if len(line) > LONGEST_LINE and k not in generated] == []


@pytest.mark.parametrize("path", plumbing.LESSONS, ids=lambda path: path.stem)
def test_a_core_lesson_teaches_and_leaves_the_plumbing_to_the_workshop(path):
    assert plumbing.share(path) < plumbing.MOST


@pytest.mark.parametrize("source, lines", [
    ("import json\nx = 1", 1), ("def _check(x):\n    y = x\n    return y", 3), ("if x < 1:\n    raise ValueError(x)\ny = x", 2),
    ("try:\n    f()\nexcept ValueError as error:\n    print(error)", 4), ("text = json.dumps(x)\nimage = render(x)", 1),
    ("def render(x):\n    with torch.no_grad():\n        return x", 0), ("# import json\n\nx = 1", 0),
])
def test_plumbing_is_found(source, lines):
    assert len(plumbing.plumbing_lines(ast.parse(source)) & set(plumbing.code_lines(source))) == lines


def test_a_lesson_imports_only_what_an_earlier_one_taught():
    graph, number = import_graph(), {}
    for k, path in enumerate(NOTEBOOKS):
        if path.stem[:2].isdigit():
            number |= {name: k for name in exported_modules(path)}
    late = {(name, other) for name in number for other in graph[name] if number.get(other, -1) > number[name]}
    assert late == set()


def test_no_module_is_imported_by_its_name_but_through_the_door():
    "A string with the name of a module is an arrow that no other test sees."
    for path in MODULES:
        strings = {node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                   if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert module_name(path) == DOOR or not strings & KNOWN, f"{path}: {strings & KNOWN}"


@pytest.mark.parametrize("line, name", [
    ("from .train import train", "train"), ("from gs2d.train import train", "train"), ("import gs2d.train", "train"), ("import gs2d", ""),
    ("from gs2d import train", "train"), ("from . import train", "train"), ("def f():\n    from gs2d.train import train", "train"),
    ("from . import Gaussians2D", "Gaussians2D"), ("from .io.files import atomic_write", "io.files"), ("from .io import files", "io.files"),
])
def test_an_import_is_found(line, name):
    assert imported_from_gs2d(ast.parse(line), "loss") == {name}


@pytest.mark.parametrize("line", ["from . import __version__", "import torch", "from torch import nn"])
def test_an_import_from_elsewhere_is_none_of_ours(line):
    assert imported_from_gs2d(ast.parse(line), "loss") == set()


@each_module
def test_no_star_imports_no_patched_methods_no_nbdev(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            origin = (node.module or "") if isinstance(node, ast.ImportFrom) else names[0]
            assert "*" not in names, f"line {node.lineno}: import *"
            assert origin.split(".")[0] not in ("nbdev", "fastcore", "execnb"), f"line {node.lineno}: imports {origin}"
        for decorator in getattr(node, "decorator_list", []):
            assert not ast.unparse(decorator).startswith("patch"), f"line {decorator.lineno}: @{ast.unparse(decorator)}"


def undocumented(tree: ast.Module, public: set) -> list:
    "Public functions and classes, and the public methods of those classes, that have no docstring."
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    missing = []
    for node in tree.body:
        if not isinstance(node, (*functions, ast.ClassDef)) or node.name not in public:
            continue
        members = [member for member in node.body if isinstance(member, functions) and not member.name.startswith("_")
                   and not any(ast.unparse(decorator).endswith(".setter") for decorator in member.decorator_list)]
        missing += [node.name] * (not ast.get_docstring(node))
        if isinstance(node, ast.ClassDef):
            missing += [f"{node.name}.{member.name}" for member in members if not ast.get_docstring(member)]
    return missing


@each_module
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has none: its notebook needs `# Title` and `> one line` in the first cell"
    (public,) = [ast.literal_eval(node.value) for node in tree.body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    assert undocumented(tree, set(public)) == []


def test_missing_docstrings_are_found():
    text = 'class A:\n    "A."\n    def f(self): pass\n    def _g(self): pass\ndef h(): pass\ndef _i(): pass'
    assert undocumented(ast.parse(text), {"A", "h"}) == ["A.f", "h"]


# --- the package ----------------------------------------------------------------------------------

HEAVY = ["nbdev", "fastcore", "ipywidgets", "cv2", "matplotlib.pyplot", "numba"]


def imported_by(code: str) -> set:
    "Which of HEAVY a fresh interpreter has imported after `code`."
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    program = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


LIVE = ("choices", "controls", "display", "panel", "saving", "still")  # made of ipywidgets, or used by those alone


def test_importing_gs2d_is_light():
    assert imported_by("import gs2d") == set()


def test_importing_every_module_without_kernels_or_widgets_is_light():
    modules = [module_name(path) for path in MODULES if path.stem not in LIVE]
    modules = [name for name in modules if not name.startswith("kernels.") or name == "kernels.operators"]
    assert imported_by(f"import importlib\nfor name in {modules}: importlib.import_module('gs2d.' + name)") == set()


def settings() -> configparser.SectionProxy:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_versions_agree():
    text = (ROOT / "gs2d" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.*)"$', text, re.MULTILINE) == [settings()["version"]]


def test_every_requirement_has_an_exact_version():
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    required = " ".join(settings()[key] for key in ("requirements", "dev_requirements")).split()
    assert {re.split(r"[<>=!~]", name)[0].lower() for name in required} - pinned == set()


# --- the notebooks --------------------------------------------------------------------------------


@each_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size <= 800 * 1024


@each_notebook
def test_notebook_starts_with_a_title_and_one_line(path):
    assert re.match(r"# \S.*\n+> \S", source(cells(path)[0]))


@each_notebook
def test_every_cell_has_its_own_id(path):
    ids = [cell.get("id") for cell in cells(path)]
    assert all(ids) and len(set(ids)) == len(ids)


@each_notebook
def test_notebook_stores_no_widgets_and_no_video(path):
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    for cell_id, output in outputs(path):
        for kind, value in output.get("data", {}).items():
            assert "widget" not in kind, f"cell {cell_id}: a stored widget cannot be drawn without its kernel, store a still picture"
            assert not kind.startswith("video/") and "data:video" not in "".join(value), f"cell {cell_id}: a video"


@each_notebook
def test_every_figure_has_alternative_text(path):
    for cell in cells(path, "code"):
        shown = [(kind, "".join(value)) for output in cell["outputs"] for kind, value in output.get("data", {}).items()]
        if any(kind.startswith("image/") for kind, _ in shown):
            assert re.search(r"""^#\|\s*fig-alt:\s*["']?\w""", source(cell), re.MULTILINE), f"cell {cell['id']}"
        for tag in re.findall("<(?:img|iframe|svg)[^>]*>", "".join(value for kind, value in shown if kind == "text/html")):
            assert re.search(r"""\b(?:alt|title|aria-label)=["']\w""", tag), f"cell {cell['id']}: {tag[:80]}"
    for cell in cells(path, "markdown"):
        assert not re.search(r"!\[\s*\]\(", source(cell)), f"cell {cell['id']}: a picture without alternative text"


@each_notebook
def test_stored_pages_are_drawn_by_the_viewer_of_today(path):
    "A page in an output has the viewer in it: who changes that runs the lessons again."
    script = (ROOT / "gs2d" / "show" / "viewer.js").read_text(encoding="utf-8")
    for cell_id, output in outputs(path):
        for page in re.findall('srcdoc="([^"]*)"', "".join(output.get("data", {}).get("text/html", ""))):
            assert script in html.unescape(page), f"cell {cell_id}"


@each_notebook
def test_no_warnings_no_errors_in_outputs(path):
    for cell_id, output in outputs(path):
        assert output["output_type"] != "error" and output.get("name") != "stderr", f"cell {cell_id}: {output}"


@each_notebook
def test_no_paths_of_one_machine_in_outputs(path):
    local = re.compile("|".join([r"/(?:home|root|Users|tmp)/", r"\b[A-Z]:\\", *map(re.escape, {str(ROOT), tempfile.gettempdir()})]))
    for cell_id, output in outputs(path):
        texts = [output.get("text", ""), *(value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))]
        for text in map("".join, texts):
            assert not local.search(text), f"cell {cell_id}: {local.search(text)[0]}"


@each_notebook
def test_links_resolve(path):
    for cell in cells(path, "markdown"):
        for link in readme.LINK.finditer(source(cell)):
            target = unquote(link["target"].partition("#")[0])
            if readme.is_relative(link["target"]):
                assert (path.parent / target).exists(), f"cell {cell['id']}: {link['target']}"


# --- the README -----------------------------------------------------------------------------------


def test_readme_is_the_index_notebook():
    expected = readme.render(json.loads(readme.NOTEBOOK.read_text(encoding="utf-8")))
    assert readme.README.read_text(encoding="utf-8") == expected, "write it with `make export`"


def test_readme_rendering():
    notebook = {"cells": [
        {"cell_type": "markdown", "source": ["# Title\n", '![fit](images/fit.png) [next](00_a.ipynb#top) <img src="images/a.png">\n',
                                             "[license](../LICENSE) [web](https://example.org/x) [here](#title)"]},
        {"cell_type": "code", "source": ["#| hide\n", "secret()"], "outputs": []},
        {"cell_type": "code", "source": ["#| eval: false\n", "1 + 1"],
         "outputs": [{"output_type": "stream", "name": "stdout", "text": ["hello\n"]},
                     {"output_type": "execute_result", "data": {"text/plain": ["2"]}}]},
    ]}
    assert readme.render(notebook) == (
        '# Title\n![fit](nbs/images/fit.png) [next](nbs/00_a.ipynb#top) <img src="nbs/images/a.png">\n'
        "[license](LICENSE) [web](https://example.org/x) [here](#title)\n\n"
        "```python\n1 + 1\n```\n\n```text\nhello\n```\n\n```text\n2\n```\n"
    )


def test_readme_refuses_pictures_inside_the_notebook():
    picture = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}}
    with pytest.raises(ValueError, match="nbs/images"):
        readme.render({"cells": [{"cell_type": "code", "source": "show()", "outputs": [picture]}]})


# --- the website, the workflows, the files at the top ---------------------------------------------


def pages(contents: list) -> list:
    "Every page of a Quarto sidebar, sections included."
    found = []
    for entry in contents:
        if isinstance(entry, str):
            found.append(entry)
        else:
            found += [entry["href"]] if "href" in entry else []
            found += pages(entry.get("contents", []))
    return found


def test_sidebar_lists_every_notebook_once():
    sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    assert sorted(pages(sidebar)) == sorted(path.relative_to(ROOT / "nbs").as_posix() for path in NOTEBOOKS)


def test_navbar_links_to_pages():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    for item in config["website"]["navbar"]["left"]:
        assert (ROOT / "nbs" / item["href"]).exists(), item


def test_quarto_settings_are_at_the_top():
    assert (ROOT / "nbs" / "_quarto.yml").read_text() == "metadata-files: [../_quarto.yml, nbdev.yml, sidebar.yml]\n"
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert "metadata-files" not in config
    assert config["project"] == {"type": "website", "output-dir": settings()["doc_path"]}
    assert (ROOT / "nbs" / config["format"]["html"]["css"]).exists()


def test_workflows_parse_and_cover_the_python_versions():
    jobs = {path.name: yaml.safe_load(path.read_text())["jobs"] for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert sorted(jobs) == ["docs.yml", "test.yml"]
    assert jobs["test.yml"]["test"]["strategy"]["matrix"]["python-version"] == ["3.10", "3.11", "3.12", "3.13"]


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and re.search(r"^make test$", script.read_text(), re.MULTILINE)


def test_nbdev_writes_no_pyproject():
    assert not (ROOT / "pyproject.toml").exists()


def test_what_can_go_wrong_names_tests_that_exist():
    page = json.loads((ROOT / "nbs/what_can_go_wrong.ipynb").read_text(encoding="utf-8"))
    text = "".join("".join(cell["source"]) for cell in page["cells"])
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what happens")]
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, f"no test in: {row}"
        for name in named:
            assert f"def {name}(" in tests, name
    assert len(rows) > 20
