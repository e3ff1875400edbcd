"""Check that the notebooks are clean, and that the modules, README.md and the docs' settings are what they export.

It exports and cleans in a copy, so the checkout stays as it is, uncommitted changes included.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ["settings.ini", "README.md", "nbs", "gs2d", "tests/readme.py"]
NOT_COPIED = shutil.ignore_patterns("__pycache__", ".*")


def copy_project(to: Path) -> None:
    for name in COPIED:
        source, target = ROOT / name, to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=NOT_COPIED)
        elif source.exists():
            shutil.copy(source, target)


def contents(folder: Path) -> dict:
    "Path inside `folder` -> bytes, of every file."
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def generate(folder: Path) -> None:
    "Make again what is made from the notebooks; a module that no notebook exports any more is then missing."
    for module in folder.glob("gs2d/**/*.py"):
        if module.name != "__init__.py":
            module.unlink()
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}  # with it nbdev exports nothing
    refresh = "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()"
    tools = Path(sys.executable).parent
    for command in ([tools / "nbdev_export"], [tools / "nbdev_clean"], [sys.executable, "-c", refresh], [sys.executable, "tests/readme.py"]):
        subprocess.run(command, cwd=folder, env=environment, check=True)


def differences(before: dict, after: dict) -> list:
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        copy_project(folder)
        checkout = contents(folder)
        generate(folder)
        first = contents(folder)
        generate(folder)
        second = contents(folder)
    for path in differences(checkout, first):
        what = ("is made by no notebook" if path not in first else "is missing" if path not in checkout else
                "is not clean" if path.endswith(".ipynb") else "is not what the notebooks and settings.ini give")
        print(f"{path} {what}", file=sys.stderr)
    for path in differences(first, second):
        print(f"{path} changes again when it is exported and cleaned a second time", file=sys.stderr)
    if checkout == first == second:
        print(f"{len(checkout)} files are what the notebooks export, and a second round changes nothing.")
        return 0
    print("The notebooks are the source: change them there, then run `make export`.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
