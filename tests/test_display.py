"""The widgets of the live view: what Python sends, and, in Chromium, what the browser makes of it. No JupyterLab: a model of a few
lines stands in for the kernel's side. Without Chromium this fails; `make browser` installs it.

Nothing here waits for a time: what is waited for is something that can be seen in the page.
"""
import base64
import io
import math
import shutil
import struct
from xml.dom import minidom

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from ipywidgets.widgets import widget as widget_registry
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from gs2d.gaussians import Blend, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.renderer import project, rasterize
from gs2d.show.display import CurvesView, PictureView
from gs2d.show.views import View, gaussian_at, parts_at
from gs2d.train import StepRecord

PATIENCE = 60_000  # milliseconds, for a machine that is busy with other things
RED, BLUE, GREEN = (200, 30, 30), (30, 30, 200), (30, 150, 30)
MODEL = """
window.Model = class Model {  // what anywidget hands to a view, as far as these views use it
  constructor(state) { this.state = {}; this.heard = {}; this.sent = []; this.saved = {}; for (const k in state) this.state[k] = Model.value(state[k]); }
  static value(v) { return v && v.$bytes !== undefined ? new DataView(Uint8Array.from(atob(v.$bytes), c => c.charCodeAt(0)).buffer) : v; }
  get(name) { return this.state[name]; }
  set(name, v) { v = Model.value(v); if (this.state[name] !== v) { this.state[name] = v; this.fire('change:' + name, v); } }
  save_changes() { this.saved = {...this.state}; }
  send(message) { this.sent.push(message); }
  on(name, f) { (this.heard[name] ||= new Set()).add(f); }
  off(name, f) { this.heard[name]?.delete(f); }
  fire(name, ...values) { for (const f of this.heard[name] || []) f(...values); }
};
window.left = new Set();  // observers and addresses of bytes that a view has made, and not given back
window.rendering = false;
for (const kind of ['ResizeObserver', 'MutationObserver']) window[kind] = class extends window[kind] {
  constructor(f) { super(f); if (window.rendering) window.left.add(this); }
  disconnect() { super.disconnect(); window.left.delete(this); }
};
window.made ||= [URL.createObjectURL, URL.revokeObjectURL];
URL.createObjectURL = bytes => { const url = window.made[0].call(URL, bytes); window.left.add(url); return url; };
URL.revokeObjectURL = url => { window.made[1].call(URL, url); window.left.delete(url); };
window.show = async (state, esm, css) => {
  document.head.append(Object.assign(document.createElement('style'), {textContent: css}));
  const url = URL.createObjectURL(new Blob([esm], {type: 'text/javascript'}));
  const view = (await import(url)).default;
  URL.revokeObjectURL(url);
  window.model = new Model(state);
  window.rendering = true;
  window.end = view.render({model: window.model, el: document.getElementById('view')});
  window.rendering = false;
};
"""
PAGE = """<!doctype html><html lang="en"><head><title>live</title></head><body data-jp-theme-light="{light}" style="margin: 20px; background: {paper};
--jp-ui-font-color1: {ink}; --jp-layout-color1: {paper}"><main><h1 style="font-size: 14px; margin: 0 0 8px; color: {ink}">live</h1><div id="view"></div>
<div style="height: 2000px"></div></main></body></html>"""


def png(color, size=(60, 40)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "png")
    return file.getvalue()


def record(step, loss=None, psnr=None, lr=0.01, n=30) -> StepRecord:
    return StepRecord(step, 0.5 * 0.99**step if loss is None else loss, 10 + 0.1 * step if psnr is None else psnr, lr, n, 1.0)


def run_of(n_steps) -> list:
    return [record(step, n=30 + 10 * (step >= 40)) for step in range(n_steps)]


def sent_by(widget) -> list:
    "What a widget sends from now on: (what it says, how many bytes)."
    messages = []
    widget._send = lambda message, buffers=None: messages.append((message, sum(map(len, buffers or ()))))
    return messages


@pytest.fixture
def pictures():
    widget = PictureView(description="step 12, 20.0 dB")
    widget.set_target(png(BLUE))
    widget.set_frame({"render": png(RED), "error": png(GREEN)}, "png")
    yield widget
    widget.close()


@pytest.fixture
def curves():
    widget = CurvesView()
    yield widget
    widget.close()


# --- the Gaussian at a point ------------------------------------------------------------------------


@pytest.mark.parametrize("blend", Blend)
def test_the_gaussian_at_a_point_is_the_one_that_the_render_shows_most_of(blend):
    "An independent oracle: with a colour channel for each Gaussian, the renderer itself says which part each one has."
    scene = GroundTruth.random(14, 12, 18, seed=3, blend=blend).scene
    screen = project(scene, 12, 18)._replace(colors=torch.eye(14))
    shares, compared = rasterize(screen, 12, 18, blend, backend="reference").detach(), 0
    for i, j in np.ndindex(12, 18):
        found, share = gaussian_at(scene, (j + 0.5) / 18, (i + 0.5) / 12), shares[i, j]
        if share.max() == 0:
            assert found is None
            continue
        first, second = share.topk(2).values
        if first - second > 1e-4:
            assert found["index"] == share.argmax(), (i, j)
            assert found["rows"][-1][1] == f"{share[found['index']]:.0%}" or abs(float(found["rows"][-1][1][:-1]) / 100 - first) < 0.006
            compared += 1
    assert compared > 100


def test_the_gaussian_at_a_point_is_the_one_of_a_loop_over_all():
    scene = GroundTruth.random(9, 20, 20, seed=8, blend="additive").scene
    generator = np.random.default_rng(0)
    for x, y in generator.random((60, 2)):
        px, py, parts = -5 + 10 * x, 5 - 10 * y, []
        for mean, (sx, sy), turn, opacity in zip(scene.means.tolist(), scene.scales.tolist(), scene.rotations.tolist(), scene.opacities.tolist()):
            dx, dy = px - mean[0], py - mean[1]
            u, v = math.cos(turn) * dx + math.sin(turn) * dy, -math.sin(turn) * dx + math.cos(turn) * dy
            power = (u / sx) ** 2 + (v / sy) ** 2
            parts.append(opacity * math.exp(-power / 2) if power <= 2 * math.log(255) else 0.0)
        assert np.allclose(parts_at(scene, x, y).detach(), parts, atol=1e-5)
        found = gaussian_at(scene, x, y)
        assert (found is None and max(parts) == 0) or found["index"] == int(np.argmax(parts))


def test_a_described_gaussian_says_where_it_is_and_how_large():
    scene = Gaussians2D.from_values([[2.0, 1.0]], [[1.0, 0.25]], [math.pi / 2], [0.5], [[1.0, 0.0, 2.0]])
    found = gaussian_at(scene, 0.7, 0.4)
    outline = np.array(found["outline"])
    assert np.allclose(outline.mean(0), [0.7, 0.4], atol=1e-6) and found["color"] == "#ff00ff"
    assert np.allclose(np.ptp(outline, axis=0), [0.1, 0.4], atol=1e-4), "upright: 2 × 2 × 0.25 wide, 2 × 2 × 1 high, of 10 units"
    rows = dict(found["rows"])
    assert rows["centre"] == "2.00, 1.00" and rows["size"] == "1 × 0.25" and rows["turned"] == "90°" and rows["opacity"] == "0.50"
    assert gaussian_at(scene, 0.1, 0.9) is None


def test_no_gaussian_where_there_is_none_or_none_with_numbers():
    nothing = torch.zeros(0)
    empty = Gaussians2D.from_values(torch.zeros(0, 2), torch.ones(0, 2), nothing, nothing, torch.zeros(0, 3))
    assert gaussian_at(empty, 0.5, 0.5) is None
    broken = GroundTruth.random(3, 8, 8, seed=0).scene.clone()
    for name in ("means", "colors"):
        scene = broken.clone()
        getattr(scene, name).data[:] = math.nan
        assert gaussian_at(scene, 0.5, 0.5) is None


# --- what Python sends ------------------------------------------------------------------------------


def test_only_what_has_changed_is_sent(pictures):
    messages, frame = sent_by(pictures), png(BLUE)
    pictures.set_frame({"render": frame})
    pictures.set_frame({"render": bytes(bytearray(frame))})  # the same picture again
    assert [(message["buffer_paths"], size) for message, size in messages] == [([["render_frame"]], len(frame))]
    messages.clear()
    pictures.description = "step 13"
    assert len(messages) == 1 and messages[0][1] == 0


def test_names_that_are_none_are_told_apart(pictures):
    for action in (lambda: pictures.set_frame({"heatmap": b""}), lambda: pictures.set_frame({}, "webp"),
                   lambda: setattr(pictures, "view", "side_by_side"), lambda: setattr(pictures, "compare", "both")):
        with pytest.raises(ValueError, match="expected one of .*, got "):
            action()
    pictures.view = View.OUTLINES
    assert pictures.view == "outlines" and type(pictures.view) is str


@pytest.mark.parametrize("view, compare, needed", [
    ("render", "beside", {"render", "error"}), ("error", "beside", {"render", "error"}), ("outlines", "beside", {"outlines", "error"}),
    ("target", "beside", {"render", "error"}), ("render", "wipe", {"render"}), ("target", "wipe", {"render"}), ("error", "none", {"error"}),
    ("opacity", "wipe", {"opacity"}), ("target", "none", set())])
def test_only_what_is_on_view_is_needed(pictures, view, compare, needed):
    pictures.view, pictures.compare = view, compare
    assert set(pictures.needed) == needed


def test_who_points_gets_an_answer_and_may_ask_again_also_after_an_error(pictures):
    asked, messages = [], sent_by(pictures)
    assert not pictures.pointing
    pictures.on_point(lambda x, y: asked.append((x, y)) or pictures.show_gaussian(dict(index=3)))
    pictures._handle_custom_msg({"type": "point", "x": 0.25, "y": 0.5, "pin": False, "id": 7}, [])
    contents = [message["content"] for message, _ in messages if message["method"] == "custom"]
    assert pictures.pointing and asked == [(0.25, 0.5)] and pictures.pinned is None
    assert contents == [{"type": "gaussian", "id": 7, "gaussian": {"index": 3}}, {"type": "ready", "id": 7}]
    pictures.on_point(lambda x, y: 1 / 0)
    messages.clear()
    with pytest.raises(ZeroDivisionError):
        pictures._hear(pictures, {"type": "point", "x": 0.1, "y": 0.2, "pin": True, "id": 8}, [])
    assert messages[-1][0]["content"] == {"type": "ready", "id": 8} and pictures.pinned == (0.1, 0.2)
    pictures._handle_custom_msg({"type": "unpin"}, [])
    assert pictures.pinned is None


def test_a_still_has_every_picture_with_its_words(pictures):
    pictures.description = 'step 12 <b> & "more"'
    page = minidom.parseString(pictures.still().replace('">', '">').replace("<figcaption>", "</img><figcaption>"))
    images = page.getElementsByTagName("img")
    assert [image.getAttribute("alt") for image in images] == [
        'render: step 12 <b> & "more"', 'error map: step 12 <b> & "more"', "target: the picture to reach"]
    for image, color in zip(images, (RED, GREEN, BLUE)):
        kind, data = image.getAttribute("src").split(",")
        assert kind == "data:image/png;base64" and Image.open(io.BytesIO(base64.b64decode(data))).getpixel((5, 5)) == color
    assert PictureView().still().count("img") == 0


def test_a_closed_widget_leaves_no_model_behind():
    before = set(widget_registry._instances)
    for kind in (PictureView, CurvesView):
        widget = kind()
        assert set(widget_registry._instances) > before
        widget.close()
        widget.close()
    assert set(widget_registry._instances) == before


# --- curves -----------------------------------------------------------------------------------------


def table_of(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.float32).reshape(5, -1)


def test_a_long_run_is_thinned_out_with_both_ends(curves):
    history = run_of(5000)
    curves.set_run(history, 6000, [40])
    table = table_of(curves.run)
    assert table.shape == (5, 400) and table[0, 0] == 0 and table[0, -1] == 4999 and (np.diff(table[0]) > 0).all()
    kept = [history[int(step)] for step in table[0]]
    assert np.allclose(table[1:], np.array([(r.loss, r.psnr, r.lr, r.n_gaussians) for r in kept]).T)
    assert struct.unpack("<f", curves.growth) == (40,) and curves.x_max == 6000
    curves.set_run(history[:400], 6000)
    assert table_of(curves.run).shape == (5, 400) and curves.growth == b"" and curves.x_max == 800


def test_the_axis_of_the_steps_is_long_enough_for_run_and_ghost(curves):
    for done, of, before, end in [(0, 50, 0, 50), (10, 50, 0, 20), (40, 50, 0, 50), (10, 10**6, 30, 30), (20, 10**6, 30, 40), (10, 20, 90, 90)]:
        curves.set_ghost(run_of(before))
        curves.set_run(run_of(done), of)
        assert curves.x_max == end, (done, of, before)
    curves.set_ghost(None)
    assert curves.ghost == b"" and curves.x_max == 20


def test_numbers_that_are_endless_or_none_are_drawn_around(curves):
    odd = [record(0, math.nan, -math.inf), record(1, math.inf, math.inf), record(2, 0.0, 20.0), record(3, -1.0, math.nan), record(4, 0.5, 30.0)]
    for log in (True, False):
        curves.log = log
        for history in ([], odd[:1], odd[:2], odd):
            curves.set_run(history, 10)
            lines = minidom.parseString(curves.still()).getElementsByTagName("polyline")
            points = [number for line in lines for number in line.getAttribute("points").replace(",", " ").split()]
            assert all(0 <= float(number) <= 480 for number in points) and bool(points) == (len(history) > 1), "the number of Gaussians, at least"


def test_what_stays_the_same_is_not_sent_again(curves):
    curves.set_ghost(run_of(100))
    curves.set_run(run_of(120), 500, [40])
    messages = sent_by(curves)
    curves.set_run(run_of(121), 500, [40])
    assert {key for message, _ in messages for key in [*message["state"], *(path[0] for path in message["buffer_paths"])]} == {
        "run", "description", "x_max"}


def test_a_still_draws_the_run_the_ghost_and_the_growth(curves):
    curves.set_ghost([record(step, 0.9, 12) for step in range(50)])
    curves.set_run(run_of(60), 100, [40, 50])
    svg = minidom.parseString(curves.still())
    assert svg.documentElement.getAttribute("aria-label") == curves.description
    assert "60 steps: loss from 0.5 to 0.2763" in curves.description and "Gaussians from 30 to 40" in curves.description
    lines = svg.getElementsByTagName("polyline")
    assert len(lines) == 6
    points = np.array([point.split(",") for point in lines[1].getAttribute("points").split()], float)
    assert len(points) == 60 and (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) > 0).all(), "the loss falls down the page"
    assert np.ptp(np.diff(points[:, 1])) < 0.3, "evenly, on its logarithmic axis"
    assert lines[0].getAttribute("stroke-dasharray") and not lines[1].getAttribute("stroke-dasharray")
    assert len(curves.still()) < 20_000
    curves.set_run([], 100)
    assert curves.still() == "<p>No steps yet</p>"


# --- in the browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "these tests need Chromium: run `make browser`"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    "An empty page without a network, which must end without an error."
    context = browser.new_context(viewport={"width": 900, "height": 900}, offline=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    yield page
    assert errors == []
    assert [url for url in requests if not url.startswith(("blob:", "data:", "about:"))] == [], "nothing is fetched"
    context.close()


def plain(value):
    return {"$bytes": base64.b64encode(value).decode()} if isinstance(value, (bytes, memoryview)) else value


def show(page, widget, dark=False):
    "Put the view of a widget into the page."
    colors = dict(light="false", ink="rgba(255, 255, 255, .87)", paper="#111") if dark else dict(light="true", ink="rgba(0, 0, 0, .87)", paper="#fff")
    page.set_content(PAGE.format(**colors))
    page.add_script_tag(content=MODEL)
    state = {name: plain(value) for name, value in widget.get_state().items() if not name.startswith("_")}
    page.evaluate("([state, esm, css]) => show(state, esm, css)", [state, str(widget._esm), str(widget._css)])


def set_in(page, **values):
    page.evaluate("values => { for (const name in values) model.set(name, values[name]) }", {name: plain(value) for name, value in values.items()})


class Pictures:
    "What a person sees and does with the pictures."

    def __init__(self, page):
        self.page, self.stage = page, page.locator(".gs2d-stage").first
        self.main, self.smalls = self.stage.locator("img").first, page.locator(".gs2d-smalls img")
        self.card = page.locator(".gs2d-card")
        self.wait("() => document.querySelector('.gs2d-stage img').naturalWidth")

    def wait(self, condition, *args):
        return self.page.wait_for_function(condition, arg=args[0] if args else None)

    def at(self, u, v, stage=None):
        box = (stage or self.stage).bounding_box()
        return box["x"] + u * box["width"], box["y"] + v * box["height"]

    def move(self, u, v):
        self.page.mouse.move(*self.at(u, v))

    def place(self, image=None):
        "(zoom, left, top) of an image in its stage, in sizes of the stage: what is on the screen."
        return (image or self.main).evaluate("""image => {
            const [a, b] = [image, image.closest('.gs2d-stage')].map(e => e.getBoundingClientRect());
            return [a.width / b.width, (a.left - b.left) / b.width, (a.top - b.top) / b.height];
        }""")

    def zoomed(self, least):
        self.wait("least => Number(getComputedStyle(document.querySelector('.gs2d-pictures')).getPropertyValue('--zoom')) >= least", least)

    def model(self, name):
        return self.page.evaluate("name => model.saved[name]", name)

    def sent(self, kind):
        return [message for message in self.page.evaluate("model.sent") if message["type"] == kind]

    def answer(self, index, question=None):
        "What Python does with a question: the card, and the word that the next one may come."
        question = question or self.page.evaluate("model.sent.filter(m => m.type === 'point').at(-1).id")
        gaussian = dict(index=index, outline=[[0.4, 0.4], [0.6, 0.4], [0.6, 0.6]], rows=[["opacity", "0.50"]], color="#ff8800")
        for message in ({"type": "gaussian", "id": question, "gaussian": gaussian}, {"type": "ready", "id": question}):
            self.page.evaluate("message => model.fire('msg:custom', message)", message)

    def asked(self, n):
        self.wait("n => model.sent.filter(m => m.type === 'point').length >= n", n)
        return self.sent("point")[-1]

    def color(self, u, v):
        pixels = Image.open(io.BytesIO(self.stage.screenshot())).convert("RGB")
        return pixels.getpixel((int(u * pixels.width), int(v * pixels.height)))


@pytest.fixture
def seen(page, pictures):
    show(page, pictures)
    return Pictures(page)


def near(found, expected, tolerance=0.01):
    assert np.allclose(found, expected, atol=tolerance), (found, expected)


def test_target_and_error_stand_beside_the_render_with_their_words(seen):
    expect(seen.smalls).to_have_count(2)
    alts = [seen.main.get_attribute("alt"), *(image.get_attribute("alt") for image in seen.smalls.all())]
    assert alts == ["render: step 12, 20.0 dB", "target: the picture to reach", "error map: step 12, 20.0 dB"]
    large, small = seen.main.bounding_box(), seen.smalls.first.bounding_box()
    assert small["x"] > large["x"] + large["width"] and large["width"] > 1.8 * small["width"]
    assert large["width"] / large["height"] == pytest.approx(1.5, abs=0.02)
    seen.page.set_viewport_size({"width": 440, "height": 900})
    seen.wait("() => document.querySelector('.gs2d-smalls').getBoundingClientRect().top >= document.querySelector('.gs2d-stage').getBoundingClientRect().bottom")


def test_a_new_frame_replaces_the_old_one_and_frees_it(seen):
    before = seen.main.get_attribute("src")
    set_in(seen.page, render_frame=png(BLUE, (30, 60)), description="step 13")
    seen.wait("() => { const image = document.querySelector('.gs2d-stage img'); return image.complete && image.naturalHeight === 60 }")
    assert seen.main.get_attribute("alt") == "render: step 13" and seen.color(0.5, 0.5) == BLUE
    near(seen.page.evaluate("getComputedStyle(document.querySelector('.gs2d-pictures')).getPropertyValue('--ratio') * 1"), 0.5)
    assert seen.page.evaluate("[...left].filter(url => typeof url === 'string').length") == 3 and before != seen.main.get_attribute("src")
    assert not seen.page.evaluate("url => left.has(url)", before)


def test_before_the_first_frame_there_is_a_sentence(page):
    widget = PictureView()
    show(page, widget)
    expect(page.get_by_text("The picture appears as soon as there is one.")).to_be_visible()
    expect(page.locator(".gs2d-smalls")).to_be_hidden()
    set_in(page, render_frame=png(RED))
    expect(page.locator(".gs2d-none")).to_be_hidden()
    widget.close()


def test_the_large_picture_is_chosen_in_the_menu_or_below_a_small_one(seen):
    set_in(seen.page, outlines_frame=png(BLUE))
    seen.page.get_by_label("Show", exact=True).select_option("outlines")
    expect(seen.main).to_have_attribute("alt", "outlines over the render: step 12, 20.0 dB")
    assert seen.model("view") == "outlines"
    seen.page.get_by_role("button", name="Show large: error map").click()
    expect(seen.main).to_have_attribute("alt", "error map: step 12, 20.0 dB")
    assert seen.model("view") == "error" and seen.color(0.5, 0.5) == GREEN
    assert [image.get_attribute("alt").split(":")[0] for image in seen.smalls.all()] == ["render", "target"]
    set_in(seen.page, view="target")  # from Python
    expect(seen.main).to_have_attribute("alt", "target: the picture to reach")


def test_the_wheel_zooms_where_the_pointer_is_and_the_small_pictures_follow(seen):
    seen.move(0.25, 0.75)
    seen.page.mouse.wheel(0, -200)
    seen.zoomed(1.5)
    zoom, left, top = seen.place()
    near([left, top], [0.25 * (1 - zoom), 0.75 * (1 - zoom)])
    seen.move(0.8, 0.4)
    under = (0.8 - left) / zoom, (0.4 - top) / zoom
    seen.page.mouse.wheel(0, -200)
    seen.zoomed(1.5 * zoom)
    zoom, left, top = seen.place()
    near([(0.8 - left) / zoom, (0.4 - top) / zoom], under)
    for image in seen.smalls.all():
        near(seen.place(image), [zoom, left, top])
    assert seen.page.evaluate("scrollY") == 0
    seen.stage.dblclick(position={"x": 20, "y": 20})
    seen.wait("() => !document.querySelector('.gs2d-zoomed')")
    near(seen.place(), [1, 0, 0])


def test_the_page_scrolls_where_there_is_nothing_to_zoom_out_of(seen):
    x, y = seen.at(0.5, 0.3)
    seen.page.mouse.move(x, y)
    seen.page.mouse.wheel(0, 100)
    seen.wait("() => scrollY === 100")
    box = seen.stage.bounding_box()
    assert box["y"] < y < box["y"] + box["height"], "the pointer is still over the picture"
    seen.page.mouse.wheel(0, -100)  # the page has moved under the pointer, which was not moved
    seen.wait("() => scrollY === 0")
    near(seen.place(), [1, 0, 0])


def test_dragging_moves_the_picture_up_to_its_edges(seen):
    seen.stage.focus()
    for _ in range(4):
        seen.page.keyboard.press("+")
    zoom, left, top = seen.place()
    near([left, top], [(1 - zoom) / 2] * 2)
    seen.move(0.5, 0.5)
    seen.page.mouse.down()
    seen.move(0.6, 0.55)
    seen.move(0.7, 0.6)
    near(seen.place(), [zoom, left + 0.2, top + 0.1], 0.02)
    seen.move(0.9, 3)
    near(seen.place()[2], 0)
    seen.page.mouse.up()
    assert seen.sent("point") == []
    seen.move(0.3, 0.3)
    near(seen.place()[2], 0)


def test_keys_zoom_and_move(seen):
    seen.stage.focus()
    for key in ("+", "=", "ArrowLeft", "ArrowUp"):
        seen.page.keyboard.press(key)
    near(seen.place(), [1.5625, -0.28125 + 0.1, -0.28125 + 0.1])
    for key in ("ArrowRight", "ArrowDown", "-"):
        seen.page.keyboard.press(key)
    near(seen.place(), [1.25, -0.125, -0.125])
    seen.page.keyboard.press("0")
    near(seen.place(), [1, 0, 0])
    for name in ("Zoom in", "Zoom in", "Zoom out"):
        seen.page.get_by_role("button", name=name).click()
    near(seen.place()[0], 1.5)
    seen.page.get_by_role("button", name="Fit").click()
    near(seen.place()[0], 1)
    assert seen.page.get_by_role("button", name="Zoom out").is_disabled()


def test_a_large_pixel_is_a_square(page, pictures):
    pictures.set_frame({"render": png(RED, (600, 400))})
    show(page, pictures)
    seen = Pictures(page)
    assert seen.main.evaluate("image => getComputedStyle(image).imageRendering") == "auto"
    seen.stage.focus()
    for _ in range(40):
        page.keyboard.press("+")
    assert seen.main.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    zoom, width = seen.place()[0], seen.stage.bounding_box()["width"]
    assert zoom * width / 600 == pytest.approx(48, rel=0.02) and page.get_by_role("button", name="Zoom in").is_disabled()


def test_two_fingers_zoom_and_move(seen):
    seen.stage.evaluate("""stage => {
        const box = stage.getBoundingClientRect();
        const touch = (type, pointerId, u, v) => stage.dispatchEvent(new PointerEvent(type, {pointerId, pointerType: 'touch', bubbles: true,
            clientX: box.left + u * box.width, clientY: box.top + v * box.height}));
        touch('pointerdown', 1, 0.4, 0.5); touch('pointerdown', 2, 0.6, 0.5);
        touch('pointermove', 1, 0.3, 0.5); touch('pointermove', 2, 0.7, 0.5);
        touch('pointerup', 1, 0.3, 0.5); touch('pointerup', 2, 0.7, 0.5);
    }""")
    near(seen.place(), [2, -0.5, -0.5], 0.06)
    assert seen.sent("point") == []


def test_a_wipe_divides_the_render_and_the_target(seen):
    seen.page.get_by_label("wipe").check()
    divider = seen.page.get_by_role("slider")
    expect(divider).to_have_attribute("aria-label", "Divide between render, left, and target, right")
    expect(seen.page.locator(".gs2d-smalls")).to_be_hidden()
    seen.wait("() => document.querySelector('.gs2d-other img').naturalWidth")
    assert seen.model("compare") == "wipe" and [seen.color(u, 0.3) for u in (0.3, 0.46, 0.54, 0.7)] == [RED, RED, BLUE, BLUE]
    divider.focus()
    for _ in range(20):
        seen.page.keyboard.press("ArrowLeft")
    expect(divider).to_have_attribute("aria-valuetext", "40 percent from the left")
    assert [seen.color(u, 0.3) for u in (0.35, 0.45)] == [RED, BLUE]
    seen.move(0.4, 0.7)
    seen.page.mouse.down()
    seen.move(0.6, 0.7)
    seen.move(0.8, 0.7)
    seen.page.mouse.up()
    assert [seen.color(u, 0.3) for u in (0.7, 0.9)] == [RED, BLUE] and float(divider.input_value()) == pytest.approx(80, abs=2)
    near(seen.place(), [1, 0, 0])
    seen.move(0.2, 0.5)
    seen.page.mouse.wheel(0, -200)
    seen.zoomed(1.5)
    near(seen.place(seen.page.locator(".gs2d-other img")), seen.place())
    seen.page.get_by_label("alone").check()
    expect(divider).to_be_hidden()


def test_pointing_asks_for_a_gaussian_one_question_at_a_time(page, pictures):
    pictures.on_point(lambda x, y: None)
    show(page, pictures)
    seen = Pictures(page)
    seen.answer(5, 12345)  # to a question of before the page was loaded again
    expect(seen.card).to_be_hidden()
    seen.move(0.3, 0.6)
    first = seen.asked(1)
    near([first["x"], first["y"]], [0.3, 0.6])
    for k in range(5):
        seen.move(0.5 + k / 50, 0.5)
    assert len(seen.sent("point")) == 1, "the answer is not there yet"
    seen.answer(7)
    expect(seen.card).to_contain_text("Gaussian 7")
    expect(seen.card).to_contain_text("0.50")
    second = seen.asked(2)
    near([second["x"], second["y"]], [0.58, 0.5])
    assert len(seen.sent("point")) == 2 and second["pin"] is False
    box, stage = page.locator(".gs2d-line").bounding_box(), seen.stage.bounding_box()
    near([box["width"] / stage["width"], (box["x"] - stage["x"]) / stage["width"]], [0.2, 0.4], 0.02)
    page.mouse.move(5, 5)
    expect(seen.card).to_be_hidden()
    seen.answer(8, second["id"])  # too late
    expect(seen.card).to_be_hidden()
    assert page.locator(".gs2d-spot:visible").count() == 0


def test_a_click_pins_and_escape_lets_go(page, pictures):
    pictures.on_point(lambda x, y: None)
    show(page, pictures)
    seen = Pictures(page)
    seen.stage.focus()
    page.keyboard.press("+")
    seen.move(0.5, 0.5)
    seen.asked(1)
    seen.answer(1)
    page.mouse.down()
    page.mouse.up()
    pinned = seen.asked(2)
    assert pinned["pin"] is True
    near([pinned["x"], pinned["y"]], [0.5, 0.5])
    seen.answer(9)
    expect(seen.card).to_contain_text("Gaussian 9")
    expect(page.locator("div[role=status]")).to_have_text("Gaussian 9: opacity 0.50")
    seen.move(0.8, 0.8)
    page.mouse.move(5, 5)
    expect(seen.card).to_contain_text("pinned")
    assert len(seen.sent("point")) == 2
    page.keyboard.press("Escape")
    expect(seen.card).to_be_hidden()
    assert len(seen.sent("unpin")) == 1
    page.keyboard.press("Enter")
    near([seen.asked(3)["x"], seen.asked(3)["y"]], [0.5, 0.5])
    seen.answer(2)
    expect(seen.card).to_contain_text("Gaussian 2")
    page.evaluate("model.fire('msg:custom', {type: 'gaussian', id: 0, gaussian: null})")
    expect(seen.card).to_be_hidden()


def test_who_does_not_want_to_know_is_not_asked(seen):
    seen.move(0.4, 0.4)
    seen.page.mouse.down()
    seen.page.mouse.up()
    seen.stage.focus()
    seen.page.keyboard.press("Enter")
    assert seen.page.evaluate("model.sent") == []


def test_the_keys_of_a_view_do_not_reach_the_notebook(page, pictures, curves):
    curves.set_run(run_of(50), 50)
    for widget, place, keys in ((pictures, ".gs2d-stage", "+0"), (curves, "[role=group]", ["ArrowLeft"])):
        show(page, widget)
        page.evaluate("window.heardKeys = 0; document.addEventListener('keydown', () => window.heardKeys++)")
        page.locator(place).first.focus()
        for key in keys:
            page.keyboard.press(key)
        assert page.evaluate("heardKeys") == 0 and page.locator(place).first.evaluate("e => Boolean(e.closest('[data-lm-suppress-shortcuts]'))")


@pytest.mark.parametrize("kind", ["pictures", "curves"])
def test_a_view_that_ends_leaves_nothing_behind(page, kind, request):
    widget = request.getfixturevalue(kind)
    if kind == "curves":
        widget.set_run(run_of(60), 100)
    show(page, widget)
    page.wait_for_function("() => document.querySelector('img[src], canvas')")
    assert page.evaluate("left.size") > 0
    page.evaluate("end()")
    assert page.evaluate("Object.values(model.heard).reduce((n, all) => n + all.size, 0)") == 0
    assert page.evaluate("left.size") == 0 and page.locator("#view *").count() == 0
    page.evaluate("document.dispatchEvent(new Event('scroll')); dispatchEvent(new Event('resize'))")


class Charts:
    "What a person sees and does with the curves."

    def __init__(self, page):
        self.page, self.overs = page, page.locator(".u-over")
        expect(self.overs).to_have_count(3)
        page.wait_for_function("() => document.querySelector('.u-over').getBoundingClientRect().width > 200")

    def hover(self, chart, share):
        box = self.overs.nth(chart).bounding_box()
        self.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)

    def names(self):
        return " ".join(self.page.locator(".gs2d-names").all_inner_texts())

    def step(self):
        return int(self.page.locator(".gs2d-curves").get_attribute("data-step"))

    def drawn(self):
        return self.page.evaluate("[...document.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())")


def test_without_steps_there_is_a_sentence_and_no_axis(page, curves):
    show(page, curves)
    expect(page.get_by_text("The curves begin with the second step.")).to_be_visible()
    assert page.locator("canvas").count() == 0
    curves.set_run(run_of(60), 100)
    set_in(page, run=curves.run, x_max=curves.x_max, description=curves.description)
    Charts(page)
    expect(page.locator(".gs2d-none")).to_be_hidden()
    assert "60 steps: loss from 0.5" in page.get_by_role("img").first.get_attribute("aria-label")
    set_in(page, run=b"")  # a reset
    expect(page.locator(".gs2d-none")).to_be_visible()
    assert page.locator("canvas").count() == 0


def test_all_charts_speak_of_the_step_under_the_pointer(page, curves):
    history = run_of(60)
    curves.set_run(history, 60)
    show(page, curves)
    charts = Charts(page)
    assert charts.step() == 59 and "0.2763" in charts.names()
    for chart, share in ((0, 0.25), (1, 0.5), (2, 0.85)):
        charts.hover(chart, share)
        page.wait_for_function("step => Math.abs(document.querySelector('.gs2d-curves').dataset.step - step) <= 1", arg=60 * share)
        now = history[charts.step()]
        for words in (f"loss {now.loss:.4f}", f"PSNR {now.psnr:.2f} dB", "learning rate 0.01", f"Gaussians {now.n_gaussians}"):
            assert words in charts.names()
        lines = page.locator(".u-cursor-x").evaluate_all("lines => lines.map(line => line.getBoundingClientRect().right)")
        assert np.ptp(lines) < 1.5, "one line through all of them"
    page.mouse.move(5, 5)
    page.wait_for_function("() => document.querySelector('.gs2d-curves').dataset.step === '59'")


def test_keys_go_from_step_to_step_and_say_it(page, curves):
    curves.set_run(run_of(60), 60)
    show(page, curves)
    charts = Charts(page)
    page.get_by_role("group").focus()
    for key, step in (("ArrowLeft", 58), ("Shift+ArrowLeft", 38), ("ArrowRight", 39), ("Home", 0), ("ArrowLeft", 0), ("End", 59)):
        page.keyboard.press(key)
        assert charts.step() == step
    expect(page.get_by_role("status")).to_have_text("step 59, loss 0.2763, PSNR 15.90 dB, learning rate 0.01, Gaussians 40")
    page.keyboard.press("Home")
    curves.set_run(run_of(70), 70)
    before = charts.drawn()
    set_in(page, run=curves.run, x_max=curves.x_max)
    page.wait_for_function("old => document.querySelector('canvas').toDataURL() !== old", arg=before[0])
    assert charts.step() == 0, "more steps do not move what is pointed at"
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelector('.gs2d-curves').dataset.step === '69'")


def test_the_log_scale_is_switched_in_the_page_or_in_python(page, curves):
    curves.set_run(run_of(60), 60)
    show(page, curves)
    charts = Charts(page)
    before, switch = charts.drawn(), page.get_by_label("loss on a log scale")
    assert switch.is_checked()
    switch.uncheck()
    page.wait_for_function("old => document.querySelector('canvas')?.toDataURL() !== old", arg=before[0])
    assert page.evaluate("model.saved.log") is False
    set_in(page, log=True)
    page.wait_for_function("old => document.querySelector('canvas')?.toDataURL() === old", arg=before[0])
    assert switch.is_checked()


def test_the_run_before_and_the_growth_are_drawn_and_named(page, curves):
    curves.set_run(run_of(60), 60)
    show(page, curves)
    charts = Charts(page)
    before = charts.drawn()
    expect(page.get_by_text("the run before")).to_be_hidden()
    curves.set_run(run_of(60), 60, [40])
    set_in(page, growth=curves.growth)
    expect(page.get_by_text("growth", exact=True)).to_be_visible()
    page.wait_for_function("old => [...document.querySelectorAll('canvas')].every((canvas, k) => canvas.toDataURL() !== old[k])", arg=before)
    grown = charts.drawn()
    curves.set_ghost([record(step, 0.6, 12, 0.005, 25) for step in range(30)])
    set_in(page, ghost=curves.ghost)
    expect(page.get_by_text("the run before")).to_be_visible()
    page.wait_for_function("old => [...document.querySelectorAll('canvas')].every((canvas, k) => canvas.toDataURL() !== old[k])", arg=grown)
    assert "before" not in charts.names(), "it had ended by the last step"
    charts.hover(0, 0.25)
    page.wait_for_function("() => document.querySelector('.gs2d-curves').dataset.step < 20")
    for words in ("before 0.6000", "before 12.00 dB", "before 0.005", "before 25"):
        assert words in charts.names()


def test_odd_numbers_do_not_stop_the_curves(page, curves):
    odd = [record(0, math.inf, math.inf), record(1, 0.0, 99.0), record(2, -1.0, -math.inf), record(3, 1e-9, 20.0), record(4, 0.3, math.inf)]
    curves.set_run(odd, 5)
    show(page, curves)
    charts = Charts(page)
    assert "PSNR ∞ dB" in charts.names()
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.get_by_role("group").press(key)
    assert charts.step() == 2
    page.keyboard.press("Escape")
    before = charts.drawn()
    curves.set_run([now._replace(loss=now.loss if now.loss > 0 else math.nan, psnr=15.0) for now in odd], 5)
    set_in(page, run=curves.run)
    page.wait_for_function("old => document.querySelectorAll('canvas')[1].toDataURL() !== old", arg=before[1])
    assert charts.drawn()[0] == before[0], "what has no logarithm is a gap, as what is not a number"


def test_curves_follow_the_theme_and_the_width(page, curves):
    curves.set_run(run_of(60), 60)
    show(page, curves)
    charts = Charts(page)
    light = charts.drawn()
    page.evaluate("document.body.setAttribute('data-jp-theme-light', 'false')")
    page.wait_for_function("old => [...document.querySelectorAll('canvas')].every((canvas, k) => canvas.toDataURL() !== old[k])", arg=light)
    page.evaluate("document.body.setAttribute('data-jp-theme-light', 'true')")
    page.wait_for_function("old => [...document.querySelectorAll('canvas')].every((canvas, k) => canvas.toDataURL() === old[k])", arg=light)
    page.set_viewport_size({"width": 500, "height": 900})
    page.wait_for_function("() => [...document.querySelectorAll('.uplot')].every(plot => plot.getBoundingClientRect().right <= 481)")


def test_without_jupyter_the_preference_of_the_browser_counts(page, curves):
    curves.set_run(run_of(60), 60)
    show(page, curves)
    page.evaluate("document.body.removeAttribute('data-jp-theme-light')")
    charts = Charts(page)
    page.wait_for_function("() => getComputedStyle(document.querySelector('.gs2d-curves')).colorScheme === 'light dark'")
    light = charts.drawn()
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("old => document.querySelector('canvas').toDataURL() !== old", arg=light[0])


def test_the_pictures_follow_a_resized_window(seen):
    for width in (320, 700, 1400):
        seen.page.set_viewport_size({"width": width, "height": 900})
        seen.wait("width => innerWidth === width && document.documentElement.scrollWidth <= width", width)
        assert seen.page.locator(".gs2d-pictures").evaluate(
            "root => [...root.querySelectorAll('*')].filter(e => e.offsetParent && !e.closest('.gs2d-stage') && e.getBoundingClientRect().right > root.getBoundingClientRect().right + 1).length") == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("state", ["empty", "beside", "wipe", "curves", "no curves"])
def test_no_serious_barrier(page, pictures, curves, state, dark):
    pictures.on_point(lambda x, y: None)
    curves.set_ghost(run_of(50))
    curves.set_run(run_of(60), 100, [40])
    bare = {"empty": PictureView(), "no curves": CurvesView()}
    show(page, bare.get(state, pictures if state in ("beside", "wipe") else curves), dark)
    if state == "curves":
        Charts(page)
    elif state in ("beside", "wipe"):
        seen = Pictures(page)
        seen.stage.focus()
        page.keyboard.press("Enter")
        seen.asked(1)
        seen.answer(4)
        expect(seen.card).to_be_visible()
        if state == "wipe":
            page.get_by_label("wipe").check()
            expect(page.get_by_role("slider")).to_be_visible()
    violations = Axe().run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in violations if v["impact"] in ("serious", "critical")] == []
    for widget in bare.values():
        widget.close()
