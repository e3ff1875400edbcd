"""Build the wheel, install it in a fresh environment, and fit the default photograph for 20 steps there.

The environment has what a reader gets from `pip install gs2d`, in the versions of constraints.txt, and nothing of the checkout.
"""
import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ["render.png", "target.png", "comparison.png", "scene.json", "history.csv", "metrics.json"]
FOR_DEVELOPMENT = ["nbdev", "fastcore", "execnb", "jupyterlab", "pytest"]

# Runs in the fresh environment: where gs2d comes from, which of the heavy or foreign modules it has imported, what is installed.
PROBE = f"""
import importlib.util, json, sys
import gs2d
loaded = [name for name in ("nbdev", "fastcore", "ipywidgets", "cv2", "matplotlib.pyplot", "numba") if name in sys.modules]
installed = [name for name in {FOR_DEVELOPMENT} if importlib.util.find_spec(name)]
print(json.dumps(dict(path=gs2d.__file__, version=gs2d.__version__, loaded=loaded, installed=installed)))
"""


def expect(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"tests/check_wheel.py: {message}")


def run(*command, show: bool = True, **options) -> str:
    "Run a command, print what it says (if not `show`: only when it fails), and stop here if it fails."
    print("$", *(str(part) if len(str(part)) < 100 else "..." for part in command), flush=True)
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if show or done.returncode:
        print(done.stdout, end="", flush=True)
    expect(done.returncode == 0, f"exit status {done.returncode}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        # By way of the source distribution, so that one is complete too.
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT, show=False)
        (wheel,) = (folder / "dist").glob("*.whl")
        packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        ours = {path.relative_to(ROOT).as_posix() for kind in ("py", "js", "css", "html", "txt") for path in ROOT.glob(f"gs2d/**/*.{kind}")}
        expect(packed == ours, f"the wheel differs from gs2d/ in {sorted(packed ^ ours)}")

        venv.create(folder / "venv", with_pip=True)
        bin_folder = folder / "venv" / "bin"
        python, gs2d = bin_folder / "python", bin_folder / "gs2d"
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        away = dict(cwd=folder, env=environment)
        run(python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile",
            "--constraint", ROOT / "constraints.txt", wheel, **away)
        run(python, "-m", "pip", "check", "--disable-pip-version-check", **away)

        probe = json.loads(run(python, "-c", PROBE, **away).splitlines()[-1])
        expect(Path(probe["path"]).is_relative_to(folder / "venv"), f"gs2d was imported from {probe['path']}")
        expect(not probe["loaded"], f"`import gs2d` imports {probe['loaded']}")
        expect(not probe["installed"], f"`pip install gs2d` installs {probe['installed']}")

        run(gs2d, "--version", **away)
        run(gs2d, "fit", "--steps", 20, "--out", folder / "fit", **away)
        for name in RESULTS:
            path = folder / "fit" / name
            expect(path.is_file() and path.stat().st_size > 0, f"`gs2d fit` wrote no {name}")
        metrics = json.loads((folder / "fit" / "metrics.json").read_text())
        expect(metrics["steps"] == 20, f"expected 20 steps in metrics.json, got {metrics['steps']}")
        run(gs2d, "view", folder / "fit" / "scene.json", "--out", folder / "scene.html", "--no-browser", **away)
        expect("gs2d-viewer" in (folder / "scene.html").read_text(), "`gs2d view` wrote a page without its viewer")
        expect(metrics["version"] == probe["version"], f"metrics.json is of version {metrics['version']}")
    print(f"The wheel of gs2d {probe['version']} installs, and a fit of 20 steps writes {', '.join(RESULTS)}.")


if __name__ == "__main__":
    main()
