"""The live view as a person meets it: the lesson, in JupyterLab, in a browser. Without Chromium this fails; `make browser` installs it.

What is waited for is said by the code that does the work: the panel's words, which come last, `session.wait`, the output of the
very cell that is meant to be busy, and the number of a cell, which JupyterLab writes when the kernel has said that it is idle again.
"""
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import sync_playwright

NBS = Path(__file__).resolve().parent.parent / "nbs"
TOKEN = "only-for-this-test"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SETTINGS = {  # no questions about news; and all cells in the page, not only those near the window
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
PANEL_CELL = """play = LiveTrainer(blobs, TrainConfig(n_gaussians=30, n_iterations=10**6, lr_schedule="constant", device="cpu"))
play"""
PROBE_CELL = """import json
assert play.session.state.value == "running" or play.session.wait(60)   # the thread of a run that is over has ended
history = list(play.trainer.history)
print(json.dumps(dict(
    steps=len(history), state=play.session.state.value, n=len(play.trainer.scene), rates=sorted({record.lr for record in history}),
    threads=[thread.name for thread in threading.enumerate()].count("gs2d-training"))))"""
FOREGROUND_CELL = """in_cell = LiveTrainer(blobs, TrainConfig(n_gaussians=30, n_iterations=10**6, device="cpu"), threaded=False)
in_cell"""
BUSY_CELL = """print("busy", flush=True)
for _ in range(6000): time.sleep(0.1)"""

DOT = "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGklEQVR42mM8YaPBQApgYiARjGoY1TB0NAAAyUUBTEzmkP4AAAAASUVORK5CYII="  # 16×16 pixels


def wait_for(condition, what, seconds=120):
    "The first true value of `condition()`."
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return value


def lesson_for_the_test(folder: Path) -> None:
    "A copy of the lesson, with a few more cells at its end. The stored one is not touched."
    shutil.copy(NBS / "gs2d.mplstyle", folder)
    notebook = nbformat.read(NBS / "08_live.ipynb", 4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in (PANEL_CELL, PROBE_CELL, BUSY_CELL, FOREGROUND_CELL)]
    nbformat.write(notebook, folder / "lesson.ipynb")


@contextmanager
def jupyterlab(folder: Path):
    "The address of a JupyterLab of its own, which shares no settings and no open windows with the user's."
    own = Path(tempfile.mkdtemp())
    for name, values in SETTINGS.items():
        path = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = dict(
        os.environ, JUPYTERLAB_SETTINGS_DIR=str(own / "settings"), JUPYTERLAB_WORKSPACES_DIR=str(own / "workspaces"),
        JUPYTER_CONFIG_DIR=str(own / "config"), JUPYTER_RUNTIME_DIR=str(own / "runtime"), IPYTHONDIR=str(own / "ipython"),
        PYTHONPATH=str(NBS.parent), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0",
               f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, cwd=folder)
    try:
        printed = []
        for line in server.stderr:
            printed.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("JupyterLab did not start:\n" + "".join(printed))
        threading.Thread(target=server.stderr.read, daemon=True).start()  # so that the pipe never fills up
        yield found[0]
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        shutil.rmtree(own, ignore_errors=True)


class Lesson:
    "What a person sees and does."

    def __init__(self, page, address, path):
        self.address, self.path = address, path
        self.page, self.cells = page, page.locator(".jp-Notebook .jp-CodeCell")
        self.panel_cell, self.probe_cell, self.busy_cell, self.foreground_cell = (self.cells.nth(self.cells.count() - k) for k in (4, 3, 2, 1))
        # What cells put out, never their source.
        self.panel = self.panel_cell.locator(".jp-OutputArea-output").first

    def prompt(self, cell) -> str:
        return cell.locator(".jp-InputPrompt").first.inner_text()

    def start(self, cell) -> None:
        cell.locator(".cm-content").first.click()
        self.page.keyboard.press("Control+Enter")

    def has_ended(self, cell) -> bool:
        "Whether it has a number, and no star: the kernel has answered, and said that it is idle."
        return bool(re.search(r"\d", self.prompt(cell)))

    def run(self, cell, seconds=120) -> str:
        "Run a cell until it has a new number; its text output."
        before = self.prompt(cell)
        self.start(cell)
        wait_for(lambda: self.prompt(cell) != before and self.has_ended(cell), "a cell to run", seconds)
        return cell.locator(".jp-OutputArea").first.inner_text()

    def probe(self) -> dict:
        return json.loads(re.search(r"\{.*\}", self.run(self.probe_cell))[0])

    def click(self, name) -> None:
        self.panel.locator("button", has_text=name).first.click()

    def words(self, panel=None) -> str:
        return (panel or self.panel).locator(".widget-html", has_text=re.compile(r"step [\d,]+ of")).first.inner_text()

    def state(self) -> str:
        return re.search(r"idle|running|paused|done|failed", self.words())[0]

    def step(self) -> int:
        return int(re.search(r"step ([\d,]+) of", self.words())[1].replace(",", ""))

    def interrupt(self, cell) -> None:
        "Press the interrupt button for a cell that the kernel is busy with, and wait for the end of that cell."
        assert "*" in self.prompt(cell)
        self.page.locator("[data-command='notebook:interrupt-kernel']").first.click()
        wait_for(lambda: self.has_ended(cell), "the interrupted cell to end")

    def picture(self) -> str:
        "The pixels that are on the screen."
        return self.panel.locator(".gs2d-stage img").first.evaluate("""image => {
            const canvas = Object.assign(document.createElement('canvas'), {width: 64, height: 48});
            canvas.getContext('2d').drawImage(image, 0, 0, 64, 48);
            return image.complete && image.naturalWidth ? canvas.toDataURL() : '';
        }""")

    def slide(self, label, key, times) -> None:
        slider = self.panel.locator(".widget-inline-hbox", has=self.page.get_by_text(label, exact=True)).locator(".noUi-handle")
        slider.focus()
        for _ in range(times):
            self.page.keyboard.press(key)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "these tests need Chromium: run `make browser`"
    folder = tmp_path_factory.mktemp("lesson")
    lesson_for_the_test(folder)
    with jupyterlab(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(f"{address}/doc/tree/lesson.ipynb?token={TOKEN}")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        page.wait_for_selector("#jp-main-statusbar >> text=/\\| Idle/")
        yield Lesson(page, address, folder / "lesson.ipynb")
        browser.close()


@pytest.fixture(scope="module")
def panel(lesson):
    "The lesson after its cells have run, up to the panel."
    lesson.probe_cell.locator(".cm-content").first.click()
    lesson.page.get_by_role("menuitem", name="Run", exact=True).click()
    lesson.page.get_by_role("menuitem", name="Run All Above Selected Cell").click()
    wait_for(lambda: lesson.has_ended(lesson.panel_cell), "all cells of the lesson to run", 300)
    errors = lesson.page.locator("[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']")
    assert errors.count() == 0, errors.all_inner_texts()
    wait_for(lambda: lesson.panel.locator("button", has_text="Run").count(), "the panel")
    return lesson


@pytest.fixture
def running(panel):
    "The panel, reset and running."
    if panel.state() == "running":  # a reset of a run that runs would run on
        panel.click("Pause")
        wait_for(lambda: panel.state() != "running", "pause")
    panel.click("Reset")
    wait_for(lambda: panel.state() == "idle", "a reset")
    panel.click("Run")
    wait_for(lambda: panel.state() == "running" and panel.step() > 0, "the first steps")
    return panel


def test_the_picture_changes_and_the_counter_rises_while_another_cell_runs(running):
    pictures, steps = set(), [running.step()]

    def enough():
        pictures.add(running.picture())
        if running.step() > steps[-1]:
            steps.append(running.step())
        return len(pictures - {""}) >= 4 and len(steps) >= 4

    wait_for(enough, "the picture to change")
    first, second = running.probe(), running.probe()  # another cell, twice
    assert second["steps"] > first["steps"] > 0 and second["threads"] == 1


def test_a_slider_moved_while_it_runs_changes_the_next_records(running):
    assert running.probe()["rates"] == [0.01]
    running.slide("learning rate", "ArrowLeft", 4)
    rates = wait_for(lambda: (found := running.probe()["rates"])[0] < 0.0099 and found, "a smaller learning rate")
    assert rates[-1] == 0.01 and running.state() == "running"
    running.slide("learning rate", "ArrowRight", 4)


def test_pause_freezes_step_adds_one_reset_starts_again(running):
    running.click("Pause")
    wait_for(lambda: running.state() == "paused", "pause")
    paused = running.probe()
    assert running.step() == paused["steps"] == running.probe()["steps"] and paused["threads"] == 0
    running.click("Step")
    wait_for(lambda: running.step() == paused["steps"] + 1, "one more step")
    assert running.probe()["steps"] == paused["steps"] + 1
    running.click("Reset")
    wait_for(lambda: running.step() == 0 and running.state() == "idle", "the start")
    running.click("Run")
    wait_for(lambda: running.step() > 0, "a new run")


def test_stop_ends_the_thread(running):
    assert running.probe()["threads"] == 1
    running.click("Stop")
    wait_for(lambda: running.state() == "done", "the end")
    end = running.probe()
    assert end["threads"] == 0 and end["state"] == "done" and running.probe()["steps"] == end["steps"]
    assert running.panel.locator("button", has_text="Stop").is_disabled()
    running.click("Run")  # and goes on from there
    wait_for(lambda: running.step() > end["steps"] and running.state() == "running", "more steps")


def test_running_the_cell_again_leaves_exactly_one_training_thread(running):
    running.run(running.panel_cell)
    wait_for(lambda: running.panel.locator("button", has_text="Run").count() and running.state() == "idle", "a new panel")
    assert running.probe()["threads"] == 0
    running.click("Run")
    wait_for(lambda: running.step() > 0, "the new run")
    assert running.probe()["threads"] == 1


def test_an_interrupted_cell_leaves_nothing_running_unseen(running):
    running.start(running.busy_cell)
    running.busy_cell.locator(".jp-OutputArea-output", has_text="busy").wait_for()  # it is this cell that the kernel runs
    before = running.step()
    wait_for(lambda: running.step() > before, "training beside a busy cell")
    running.interrupt(running.busy_cell)
    wait_for(lambda: running.state() == "paused", "the interrupt")
    assert running.probe()["threads"] == 0


@pytest.mark.parametrize("width", [600, 1000, 1400])
def test_nothing_is_clipped_and_the_save_buttons_stay_together(running, width):
    running.page.set_viewport_size({"width": width, "height": 1000})
    outside = """panel => {
        const box = panel.getBoundingClientRect();
        const saves = ['Scene', 'Image', 'Video'].map(name => [...panel.querySelectorAll('button')].find(e => e.innerText.includes(name)));
        const tops = new Set(saves.map(e => Math.round(e.getBoundingClientRect().top)));
        const cut = [...panel.querySelectorAll('button, .widget-label')].filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1);
        return [...panel.querySelectorAll('button, select, input, img, label, .noUi-target, .widget-readout')]
            .filter(e => e.offsetParent && !e.closest('.gs2d-stage') && !e.closest('.gs2d-unseen'))
            .filter(e => e.getBoundingClientRect().right > box.right + 1 || e.getBoundingClientRect().left < box.left - 1)
            .concat(tops.size > 1 ? saves : [], cut)
            .map(e => e.outerHTML.slice(0, 80))
            .concat(panel.scrollWidth > panel.clientWidth + 1 ? ['it scrolls sideways'] : []);
    }"""
    wait_for(lambda: not running.panel.evaluate(outside), f"everything to fit into {width} pixels: {running.panel.evaluate(outside)}", 60)
    if folder := os.environ.get("GS2D_SCREENSHOTS"):
        running.panel.scroll_into_view_if_needed()
        wait_for(lambda: running.step() > 300, "something to see")
        running.page.screenshot(path=f"{folder}/live-{width}.png")
        running.panel.screenshot(path=f"{folder}/live-panel-{width}.png")


def test_everything_has_a_name_and_no_title_says_null(running):
    panel = running.panel
    assert panel.locator("[title='null']").count() == 0
    wait_for(lambda: None not in panel.locator(".noUi-handle").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))"), "names on the sliders")
    assert "learning rate" in panel.locator(".noUi-handle").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    unnamed = """panel => [...panel.querySelectorAll('img, input, select, button, progress, [role=slider]')].filter(e => e.offsetParent).filter(e =>
        !(e.alt || e.getAttribute('aria-label') || e.title || e.innerText?.trim() || e.labels?.length || e.closest('label'))).map(e => e.outerHTML.slice(0, 120))"""
    assert panel.evaluate(unnamed) == []


def test_target_and_error_are_beside_the_render_which_stays_large(running):
    running.page.set_viewport_size({"width": 1400, "height": 1000})
    pictures = running.panel.locator(".gs2d-stage img")
    wait_for(lambda: pictures.evaluate_all("all => all.filter(e => e.offsetParent && e.naturalWidth).length") == 3, "three pictures")
    names = pictures.evaluate_all("all => all.filter(e => e.offsetParent).map(e => e.alt.split(':')[0])")
    widths = pictures.evaluate_all("all => all.filter(e => e.offsetParent).map(e => e.getBoundingClientRect().width)")
    assert names == ["render", "target", "error map"] and widths[0] > 1.5 * widths[1]


def test_a_video_plays_inside_the_panel_and_can_be_downloaded(running):
    running.click("Video")
    running.panel.get_by_text("Recording").wait_for()
    before = running.step()
    wait_for(lambda: running.step() > before + 20, "something to film")
    running.click("Video")
    running.panel.get_by_text(re.compile("Saved|did not work|Nothing")).wait_for()
    assert "Saved" in running.panel.inner_text()
    video = running.panel.locator("video")
    video.wait_for()
    wait_for(lambda: video.evaluate("video => video.readyState >= 1 && video.duration > 0"), "a video that plays")
    link = running.panel.locator("a[download$='.webm']")
    assert link.get_attribute("href").startswith("data:video/webm;base64,")
    with running.page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename.startswith("live-step-")


def test_a_broken_picture_shows_its_error_and_a_good_one_is_taken(running):
    def upload(name, content):
        with running.page.expect_file_chooser() as chooser:
            running.panel.locator("button", has_text="Your picture").click()
        chooser.value.set_files({"name": name, "mimeType": "image/png", "buffer": content})

    upload("broken.png", b"this is not a picture")
    running.panel.get_by_text("That did not work").wait_for()
    assert "not a picture" in running.panel.inner_text() and running.state() == "running"
    upload("dot.png", base64.b64decode(DOT))
    running.panel.get_by_text("dot.png: 16 pixels wide").wait_for()
    wait_for(lambda: running.state() == "done", "the end of its run")
    assert running.probe()["n"] == 16
    running.panel.locator("select", has_text="known Gaussians").select_option("30 known Gaussians")
    wait_for(lambda: running.state() == "idle", "the first picture")


def test_in_the_foreground_the_cell_trains_until_it_is_interrupted(running):
    cell = running.foreground_cell
    panel = cell.locator(".jp-OutputArea-output").first
    running.start(cell)
    panel.locator("button", has_text="Pause").wait_for()
    before = running.words(panel)
    wait_for(lambda: running.words(panel) != before and "running" in running.words(panel), "training in the cell")
    running.interrupt(cell)
    wait_for(lambda: "paused" in running.words(panel), "the word for it")
    assert cell.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert running.probe()["threads"] == 0, "the view before was closed"


def test_a_page_that_is_loaded_again_shows_what_the_closed_views_left(panel):
    "Loaded again, a page asks the kernel for the parts of all that is open; for a part that was closed it would wait for ever."
    page, opened = panel.page, panel.foreground_cell.locator(".jp-OutputArea-output").first
    if not opened.locator("button").count():  # closes the view of the cell before
        panel.start(panel.foreground_cell)
        opened.locator("button", has_text="Pause").wait_for()
        panel.interrupt(panel.foreground_cell)
    page.keyboard.press("Control+s")
    page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
    page.reload()
    page.wait_for_selector("#jp-main-statusbar >> text=/\\| Idle/")
    panel.panel.locator("img[alt^='render']").wait_for()
    opened.locator("button", has_text="Run").wait_for()
    assert "closed" in panel.panel.inner_text() and page.get_by_text("Loading widget").count() == 0
    if folder := os.environ.get("GS2D_SCREENSHOTS"):
        panel.panel.scroll_into_view_if_needed()
        panel.panel.screenshot(path=f"{folder}/live-closed.png")


def visible(page, words) -> int:
    "How many times these words are to be seen, outside of the source of cells."
    return page.locator(".jp-OutputArea-output", has_text=words).locator("visible=true").count()


def test_a_saved_notebook_that_is_opened_without_its_kernel_shows_still_pictures(panel):
    "The kernel that knew the views is gone. What is left of them is a number, and the still that was stored beside it."
    page, headers = panel.page, {"Authorization": f"token {TOKEN}"}
    page.keyboard.press("Control+s")
    page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
    assert panel.panel.locator("visible=true").count() and not panel.panel_cell.locator(".jp-OutputArea-output").nth(1).is_visible()
    for session in page.request.get(f"{panel.address}/api/sessions", headers=headers).json():
        assert page.request.delete(f"{panel.address}/api/sessions/{session['id']}", headers=headers).ok
    page.goto("about:blank")
    page.goto(f"{panel.address}/doc/tree/lesson.ipynb?token={TOKEN}")  # which starts another kernel
    page.wait_for_selector("#jp-main-statusbar >> text=/\\| Idle/")
    stored = panel.panel_cell.locator("img[alt^='render']")
    wait_for(lambda: visible(page, "Loading widget") == 0 and stored.locator("visible=true").count() == 1, "the still")
    assert visible(page, "model not found") == 0
    assert "step " in panel.panel_cell.locator(".jp-OutputArea").first.inner_text()
    if folder := os.environ.get("GS2D_SCREENSHOTS"):
        panel.panel_cell.scroll_into_view_if_needed()
        panel.panel_cell.screenshot(path=f"{folder}/live-still.png")


def test_a_page_made_of_the_saved_notebook_shows_still_pictures(panel):
    stored = json.loads(panel.path.read_text())["cells"][-4]["outputs"]
    assert [sorted(output["data"]) for output in stored] == [
        ["application/vnd.jupyter.widget-view+json", "text/html", "text/plain"], ["text/html", "text/plain"]]
    assert sum(len("".join(output["data"]["text/html"])) for output in stored) < 120_000
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", panel.path.name], cwd=panel.path.parent, check=True, capture_output=True)
    page = panel.page.context.browser.new_page()
    page.goto(panel.path.with_suffix(".html").as_uri())
    cell = page.locator(".jp-CodeCell").nth(panel.cells.count() - 4)
    cell.locator("img[alt^='render']").wait_for(state="visible")
    assert cell.locator("img").locator("visible=true").count() == 3 and "A live view" not in cell.inner_text()
    page.close()
