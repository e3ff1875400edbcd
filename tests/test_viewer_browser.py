"""The viewer as a person meets it: a page opened from a file, in Chromium, with the network off. Without Chromium this fails.

What is drawn is held to `render` of the very numbers that the page stores, after they were rounded. The viewer says when it has
drawn (`idle`), and every wait here waits for that, or for words on the page.
"""
import base64
import io
import json
import math
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import smooth_picture
from PIL import Image
from playwright.sync_api import sync_playwright

import gs2d
from gs2d.gaussians import PARAMETER_NAMES, Blend, Domain2D, Gaussians2D
from gs2d.io.moments import Moment, Recording, encoded
from gs2d.io.pages import page_bytes
from gs2d.renderer import render

SHOW = Path(gs2d.__file__).parent / "show"
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--force-color-profile=srgb"]
DOMAIN = Domain2D((-5, 5), (-3, 3))
HEIGHT, WIDTH = 60, 100


# ------------------------------------------------------------------------------------------------ pages to look at

def random_scene(n=40, channels=3, blend=Blend.WEIGHTED, seed=0, spread=1.0):
    "Gaussians of all shapes, with colours below 0 and above 1; some reach out of the domain, some are thinner than a pixel."
    g = torch.Generator().manual_seed(seed)
    means = (torch.rand(n, 2, generator=g) - 0.5) * torch.tensor([12.0, 8.0]) * spread
    log_scales = torch.randn(n, 2, generator=g) * 0.8 - 0.9
    colors = torch.randn(n, channels, generator=g) * 0.5 + 0.5
    background = tuple((torch.rand(channels, generator=g) * 0.6).tolist())
    return Gaussians2D(means, log_scales, 3 * torch.randn(n, generator=g), 2 * torch.randn(n, generator=g), colors, DOMAIN, blend,
                       background)


def page_of(scenes, births=None, deaths=None, parents=None, target=None, exact=False, **changes):
    """What a page says, and the scene of each moment as it stores it: rounded, or `exact`, in float32.

    The scenes hold all the Gaussians that ever live; births and deaths say which are there when.
    """
    first, k = scenes[0], len(scenes[0])
    births, deaths = births or [0] * k, deaths or [len(scenes)] * k
    moments = []
    for m, scene in enumerate(scenes):
        ids = np.array([i for i in range(k) if births[i] <= m < deaths[i]], int)
        raw = {name: getattr(scene, name).detach().double().numpy().reshape(k, -1)[ids] for name in PARAMETER_NAMES}
        moments.append(Moment(ids, raw, dict(step=100 * m, loss=1 / (1 + m), psnr=20.0 + m)))
    recording = Recording(
        moments, np.arange(k), {i: parent for i, parent in enumerate(parents or []) if parent >= 0}, first.domain.x_dim,
        first.domain.y_dim, first.blend.value, first.background, HEIGHT, WIDTH, target, "a scene")
    page = json.loads(re.search(HEADER, page_bytes(recording).decode())[2])
    if exact:
        fields = [field | {"bits": 32} for field in page["fields"]]
        page |= dict(fields=fields, data=deflated(encoded(recording, fields)[1]))
    look, kept = (first.domain, first.blend, first.background), []
    for moment in moments:
        values = (torch.tensor(rounded(field, moment.values[field["name"]])) for field in page["fields"])
        kept.append(Gaussians2D(*(v if name in ("means", "log_scales", "colors") else v[:, 0]
                                  for name, v in zip(PARAMETER_NAMES, values)), *look))
    return page | changes, kept


def rounded(field, values):
    "The values that a page stores, by its own header, written down once more."
    if field["bits"] == 32:
        return values.astype("f4").astype("f8")
    low, high, most = np.array(field["low"]), np.array(field["high"]), 2 ** field["bits"] - 1
    return low + (high - low) * np.rint((values - low) / np.where(high > low, high - low, 1) * most) / most


def deflated(data):
    return base64.b64encode(zlib.compress(data)).decode()


HEADER = re.compile('(<script type="application/json" id="gs2d-page">)(.*?)(</script>)', re.DOTALL)


def html_of(page, options="{}"):
    "The whole page, as Python writes it, with options for the viewer, and its parts within reach."
    html = page_bytes(Recording([Moment(np.arange(1), ONE, {})], np.arange(1), {}, (0.0, 1.0), (0.0, 1.0), "over", (0.0,))).decode()
    header = json.dumps(page).replace("<", "\\u003c")
    html = HEADER.sub(lambda found: found[1] + header + found[3], html)
    mounted = "window.tools = { decode, sceneAt, project, drawCPU, GLRenderer, mount, Viewer };\nwindow.gs2d = await mount("
    assert html.count("window.gs2d = await mount(") == html.count("JSON.parse(page));") == 1
    return html.replace("window.gs2d = await mount(", mounted).replace("JSON.parse(page));", f"JSON.parse(page), {options});")


ONE = dict(means=np.zeros((1, 2)), log_scales=np.zeros((1, 2)), rotations=np.zeros((1, 1)), opacity_logits=np.zeros((1, 1)),
           colors=np.zeros((1, 1)))


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


def watched(context, tab):
    "The tab, which keeps the addresses it asks for and the errors nobody caught."
    context.set_offline(True)
    tab.requests, tab.errors = [], []
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    return tab


def open_file(tab, path, html, fails=False):
    path.write_text(html)
    tab.goto(path.as_uri())
    tab.wait_for_function("document.querySelector('[role=alert]')" if fails else "window.gs2d || document.querySelector('[role=alert]')")
    if not fails:
        assert not tab.errors, tab.errors
    return tab


@pytest.fixture(scope="module")
def ordinary(browser):
    "A tab for all pages that need nothing special, one after the other: a new one costs more than all that most tests do in it."
    context = browser.new_context()
    yield watched(context, context.new_page())
    context.close()


@pytest.fixture
def opened(browser, ordinary, tmp_path):
    "A function that opens a page from a file, with the network off. At the end, nothing but the file was asked for."
    requests, contexts = [], []

    def open_page(page, options="{}", fails=False, script=None, size=(800, 600), **special):
        viewport, tab = dict(width=size[0], height=size[1]), ordinary
        if script or special:
            contexts.append(browser.new_context(viewport=viewport, **special))
            contexts[-1].add_init_script(script or "")
            tab = watched(contexts[-1], contexts[-1].new_page())
        tab.requests, tab.errors = [], []
        requests.append(tab.requests)
        tab.set_viewport_size(viewport)
        tab.mouse.move(0, 0)
        return open_file(tab, tmp_path / f"page{len(requests)}.html", html_of(page, options), fails)

    yield open_page
    for urls in requests:
        asked = [url for url in urls if not url.startswith(("data:", "about:"))]
        assert len(asked) == 1 and asked[0].startswith("file://"), asked
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def tab(browser, tmp_path_factory):
    "One tab for what a program does: `gs2d` draws with WebGL2, `plain` on a canvas."
    context = browser.new_context(viewport=dict(width=500, height=400))
    tab = watched(context, context.new_page())
    page, _ = page_of([random_scene()])
    open_file(tab, tmp_path_factory.mktemp("viewer") / "page.html", html_of(page, '{"renderer": "webgl2"}'))
    tab.evaluate("""async (page) => { window.plain = await tools.mount(document.body.appendChild(document.createElement("div")), page,
      { renderer: "canvas" }); }""", page)
    yield tab
    context.close()


def show(tab, page, renderer="webgl2"):
    "Loads another page into one of the two viewers of `tab`; its name."
    name = dict(webgl2="gs2d", canvas="plain")[renderer]
    tab.evaluate(f"async (page) => {{ {name}.setOptions({{ size: 1, shown: null }}); await {name}.load(page); {name}.reset(); }}", page)
    assert tab.evaluate(f"{name}.renderer") == renderer
    return name


def pixels(tab, view=None, name="gs2d", width=WIDTH, height=HEIGHT):
    "(H, W, 4) what the viewer draws at that size, in [0, 1]."
    code = f"""([w, h, view]) => {{ const bytes = {name}.pixels(w, h, view); let text = "";
      for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096)); return btoa(text); }}"""
    raw = base64.b64decode(tab.evaluate(code, [width, height, view or {}]))
    return torch.tensor(np.frombuffer(raw, np.uint8).reshape(height, width, 4), dtype=torch.float32) / 255


def within(scene, domain):
    "The same Gaussians, seen through another part of the plane."
    return Gaussians2D(*(getattr(scene, name).detach() for name in PARAMETER_NAMES), domain, scene.blend, scene.background)


def expected(scene, view=None, width=WIDTH, height=HEIGHT):
    "(H, W, 4) what `render` draws there: a part of the domain is a domain."
    if view:
        x, y, w, h = view["x"], view["y"], DOMAIN.width / view["zoom"] / 2, DOMAIN.height / view["zoom"] / 2
        scene = within(scene, Domain2D((x - w, x + w), (y - h, y + h)))
    image = render(scene, height, width, backend="reference").detach().float().clamp(0, 1)
    image = image.expand(-1, -1, 3) if image.shape[-1] == 1 else image
    return image if image.shape[-1] == 4 else torch.cat([image, torch.ones(height, width, 1)], -1)


def assert_same(drawn, wanted, levels=2):
    difference = 255 * (drawn - wanted).abs().max()
    assert difference <= levels, f"{float(difference):.1f} levels of 255"


def screenshot(locator):
    "(H, W, 3) what is on the screen, in [0, 1]."
    image = Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
    return torch.tensor(np.asarray(image), dtype=torch.float32) / 255


# ------------------------------------------------------------------------------------------------ what is drawn

RENDERERS = "webgl2", "canvas"


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("blend", list(Blend))
def test_the_picture_is_that_of_render(tab, blend, channels, renderer):
    page, [scene] = page_of([random_scene(channels=channels, blend=blend)])
    name = show(tab, page, renderer)
    for view in None, dict(x=1.3, y=-0.7, zoom=4.0):
        assert_same(pixels(tab, view, name), expected(scene, view))


def test_fields_of_32_bits_are_exact(tab):
    scene = random_scene(seed=1)
    page, [kept] = page_of([scene], exact=True)
    assert {field["bits"] for field in page["fields"]} == {32}
    assert torch.equal(kept.means.float(), scene.means)
    assert_same(pixels(tab, name=show(tab, page)), expected(kept))


@pytest.mark.parametrize("renderer", RENDERERS)
def test_extreme_gaussians_are_drawn_or_left_out_as_by_render(tab, renderer):
    "Far, huge, tiny, thin, opaque and without opacity; two of them pass what `render` draws, and would be seen."
    means = [[0.3, 0.2], [2e11, 0.0], [1.0, 0.05], [-2.0, 1.0], [-2.0, 1.0], [3.0, -1.0], [1e6, 1e6]]
    log_scales = [[20.0, 18.0], [25.5, 25.5], [0.0, -17.0], [-0.5, -0.5], [-0.5, -0.5], [-9.0, -12.0], [14.0, 14.0]]
    colors = [[0.3, 0.1, 0.2], [0.0, 9.0, 0.0], [9.0, 0.0, 9.0], [0.0, 0.0, 0.0], [40.0, -1.0, 9.0], [1.0, 1.0, 1.0], [0.1, 0.2, 0.3]]
    logits = torch.tensor([-3.0, 0.0, 2.0, 30.0, 30.0, 2.0, -200.0])
    values = *map(torch.tensor, (means, log_scales)), torch.zeros(7), logits, torch.tensor(colors)
    for blend in Blend:
        page, [scene] = page_of([Gaussians2D(*values, DOMAIN, blend, (0.1, 0.2, 0.3))], exact=True)
        assert_same(pixels(tab, name=show(tab, page, renderer)), expected(scene))


def test_targets_of_16_bits_do_where_there_is_nothing_better(tab):
    "As on many phones."
    for blend in Blend:
        page, [scene] = page_of([random_scene(blend=blend)])
        show(tab, page)
        tab.evaluate("""() => { window.whole ??= gs2d.painter;
          gs2d.painter = Object.assign(new tools.GLRenderer(document.createElement("canvas"), { half: true }), { canvas: whole.canvas }); }""")
        assert_same(pixels(tab), expected(scene), 3)
    tab.evaluate("() => { gs2d.painter.destroy(); gs2d.painter = whole; }")


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_scene_has_no_pixels(tab, renderer):
    "At 50 times the slope of one Gaussian is still a slope; a magnified picture has steps of about 50 pixels there."
    scene = Gaussians2D(torch.tensor([[1.2345, 0.4321]]), torch.tensor([[-3.0, -2.5]]), torch.tensor([0.7]), torch.tensor([9.0]),
                        torch.tensor([[0.9, 0.5, 0.2]]), DOMAIN, Blend.ADDITIVE)
    page, [kept] = page_of([scene])
    view = dict(x=1.27, y=0.43, zoom=50.0)
    drawn = pixels(tab, view, show(tab, page, renderer), 200, 120)
    assert_same(drawn, expected(kept, view, 200, 120))
    row = drawn[60, :, 0]
    slope = row[(row > 0.2) & (row < 0.7)]
    changes = (slope.diff() != 0).float()
    assert len(slope) > 50 and changes.mean() > 0.6
    assert row.unique().numel() > 100


@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_deep_zoom_does_not_tremble(tab, renderer, blend):
    "At 100,000 times, where float32 has no digits left for the difference of two places; `render` here counts in float64."
    scene = random_scene(20, blend=blend, seed=3)
    centre = torch.tensor([2.34567, -1.23456])
    with torch.no_grad():
        scene.means[:3] = centre
        scene.log_scales[:3] = torch.tensor([[-10.0, -11.0], [-10.5, -9.5], [-0.5, -10.8]])
        scene.rotations[2] = 0.3
    page, [kept] = page_of([scene], exact=True)
    name = show(tab, page, renderer)
    x, y = kept.means[0].tolist()
    for shift in 0, 0.1, 0.2:  # pixels
        view = dict(x=x + shift * DOMAIN.width / WIDTH / 1e5, y=y, zoom=1e5)
        assert_same(pixels(tab, view, name), expected(kept, view))
    assert pixels(tab, view, name)[..., :3].std() > 0.05


@pytest.mark.parametrize("renderer, fine", [("webgl2", 1), ("canvas", 2)])
def test_what_is_on_the_screen_is_the_picture_the_right_way_up(opened, renderer, fine):
    "Also where a pixel of the page is four of the screen."
    page, [scene] = page_of([random_scene(seed=5)])
    tab = opened(page, json.dumps(dict(renderer=renderer, controls=False)), size=(400, 300), device_scale_factor=fine)
    drawn = screenshot(tab.locator(".gs2d-stage"))
    assert_same(drawn[30 * fine:270 * fine], expected(scene, width=400 * fine, height=240 * fine)[..., :3])  # 10 by 6 units
    assert drawn.shape == (300 * fine, 400 * fine, 3) and (drawn[:30 * fine] == drawn[0, 0]).all()  # the page around it


def test_four_channels_lie_on_a_chequerboard(opened):
    scene = Gaussians2D(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.zeros(1), torch.tensor([9.0]),
                        torch.tensor([[0.8, 0.1, 0.1, 1.0]]), DOMAIN, Blend.OVER, (0.0,) * 4)
    for renderer in RENDERERS:
        tab = opened(page_of([scene])[0], json.dumps(dict(renderer=renderer, controls=False)), size=(400, 300))
        drawn = screenshot(tab.locator(".gs2d-stage"))
        assert_same(drawn[150, 200], torch.tensor([0.79, 0.1, 0.1]), 4)
        corner = drawn[40:80, 10:50].reshape(-1, 3).unique(dim=0)
        assert {tuple(round(255 * v) for v in color.tolist()) for color in corner} >= {(204,) * 3, (255,) * 3}


@pytest.mark.parametrize("renderer", RENDERERS)
def test_smaller_and_fewer_gaussians(tab, renderer):
    page, [scene] = page_of([random_scene(30, blend=Blend.OVER, seed=2)])
    name = show(tab, page, renderer)
    tab.evaluate(f"{name}.setOptions({{ size: 0.25, shown: 7 }})")
    importance = scene.opacities * scene.scales.prod(-1)
    kept = importance.argsort(descending=True)[:7].sort().values
    values = {name: getattr(scene, name).detach()[kept] for name in PARAMETER_NAMES}
    values["log_scales"] += math.log(0.25)
    assert_same(pixels(tab, name=name), expected(Gaussians2D(*values.values(), DOMAIN, scene.blend, scene.background)))


# --------------------------------------------------------------------------------------------------- recordings

BIRTHS, DEATHS, PARENTS = [0, 0, 0, 1, 2, 2, 3], [5, 2, 5, 5, 5, 5, 5], [-1, -1, -1, 0, 1, 1, -1]  # 1 is split into 4 and 5; 6 is new


def recording(blend=Blend.WEIGHTED, **header):
    "Five moments of seven Gaussians: the page, and the scene of every moment."
    scenes = [random_scene(7, blend=blend, seed=9)]
    for m in range(1, 5):
        step = random_scene(7, blend=blend, seed=20 + m)
        moved = (getattr(scenes[-1], name).detach() + 0.15 * getattr(step, name).detach() for name in PARAMETER_NAMES)
        scenes.append(Gaussians2D(*moved, DOMAIN, blend, scenes[0].background))
    return page_of(scenes, BIRTHS, DEATHS, PARENTS, **header)


def test_every_moment_of_a_recording_is_its_scene(tab):
    for blend in Blend:
        page, scenes = recording(blend)
        show(tab, page)
        for m in 4, 1, 0, 2, 3:
            tab.evaluate("(m) => gs2d.setMoment(m)", m)
            assert_same(pixels(tab), expected(scenes[m]))


def test_between_two_moments_gaussians_are_on_their_way(tab):
    page, scenes = recording(Blend.OVER)
    show(tab, page)
    here, then = scenes[1], scenes[2]  # rows are Gaussians 0 1 2 3, and 0 2 3 4 5
    start = [0, 1, 2, 3, 1, 1]
    end = [0, None, 1, 2, 3, 4]
    for f in 0.25, 0.8:
        tab.evaluate("(t) => gs2d.setMoment(t)", 1 + f)
        values = {}
        for name in PARAMETER_NAMES:
            a, b = getattr(here, name).detach(), getattr(then, name).detach()
            values[name] = torch.stack([a[i] if j is None else (1 - f) * a[i] + f * b[j] for i, j in zip(start, end)])
        fade = torch.tensor([1, 1 - f, 1, 1, f, f], dtype=torch.float64)
        values["opacity_logits"] = torch.logit(values["opacity_logits"].sigmoid() * fade)
        assert_same(pixels(tab), expected(Gaussians2D(*values.values(), DOMAIN, Blend.OVER, here.background)))


def test_a_recording_opens_with_its_end_and_is_scrubbed(opened):
    page, scenes = recording()
    tab = opened(page)
    scrubber = tab.get_by_label("Moment of the training")
    assert tab.evaluate("gs2d.moment") == 4 and tab.locator(".gs2d-when").inner_text() == "step 400 · 24.00 dB · 6 Gaussians"
    scrubber.focus()
    for _ in range(2):
        tab.keyboard.press("ArrowLeft")
    tab.evaluate("gs2d.idle()")
    assert tab.evaluate("gs2d.moment") == 2 and tab.locator(".gs2d-when").inner_text() == "step 200 · 22.00 dB · 5 Gaussians"
    assert_same(pixels(tab), expected(scenes[2]))
    for key, moment in ("Home", 0), ("ArrowUp", 1), ("PageUp", 4), ("PageDown", 0), ("End", 4), (",", 3), (".", 4):
        tab.keyboard.press(key)
        assert tab.evaluate("gs2d.moment") == moment
    box = scrubber.bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.evaluate("gs2d.idle()")
    assert 1.8 < tab.evaluate("gs2d.moment") < 2.2


def test_space_plays_and_pauses(opened):
    tab = opened(recording()[0])
    tab.keyboard.press("Space")
    tab.wait_for_function("gs2d.playing && gs2d.moment > 0 && gs2d.moment % 1 > 0")
    assert tab.get_by_role("button", name="Pause").is_visible()
    tab.keyboard.press("Space")
    assert not tab.evaluate("gs2d.playing")
    tab.keyboard.press(".")
    moment = tab.evaluate("gs2d.moment")
    assert moment == int(moment)
    tab.evaluate("gs2d.setMoment(3.8)")
    tab.get_by_role("button", name="Play").click()
    tab.wait_for_function("!gs2d.playing && gs2d.moment === 4")  # it stops at the end
    tab.keyboard.press("Space")
    tab.wait_for_function("gs2d.playing && gs2d.moment > 0 && gs2d.moment < 3")  # and starts anew


def test_whoever_wants_less_motion_sees_whole_moments(opened):
    tab = opened(recording()[0], reduced_motion="reduce")
    tab.evaluate("""() => { window.seen = []; const set = gs2d.setMoment.bind(gs2d);
      gs2d.setMoment = (t) => { seen.push(t); set(t); }; set(1.5); gs2d.play(); }""")
    tab.wait_for_function("!gs2d.playing")
    seen = tab.evaluate("seen")
    assert seen == sorted(seen) and set(seen) == {1, 2, 3, 4}


# ---------------------------------------------------------------------------------------------- hands and keys

def view_of(tab):
    return tab.evaluate("gs2d.view")


def centre_of(tab):
    box = tab.locator(".gs2d-over").bounding_box()
    return round(box["x"] + box["width"] / 2), round(box["y"] + box["height"] / 2)


def test_keys_move_the_picture(opened):
    tab = opened(page_of([random_scene()])[0])
    tab.keyboard.press("+")  # nothing has the focus yet
    assert view_of(tab) == dict(x=0, y=0, zoom=1.5)
    tab.locator(".gs2d-over").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowUp")
    moved = view_of(tab)
    assert moved["x"] > 0.1 and moved["y"] > 0.1
    tab.wait_for_function("document.querySelector('[role=status]').textContent.startsWith('zoom ×1.5, centre')")
    tab.keyboard.press("-")
    assert view_of(tab)["zoom"] == pytest.approx(1)
    tab.keyboard.press("0")
    assert view_of(tab) == dict(x=0, y=0, zoom=1)
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowDown")
    assert view_of(tab)["x"] < -0.1 and view_of(tab)["y"] < -0.1
    tab.keyboard.press("Home")
    assert view_of(tab) == dict(x=0, y=0, zoom=1)
    tab.keyboard.press("c")  # there is no picture to compare with
    assert tab.evaluate("gs2d.options.wipe") is None
    tab.keyboard.press("o")
    assert tab.evaluate("gs2d.options.outlines")
    tab.keyboard.press("?")
    assert tab.get_by_role("dialog").is_visible()
    tab.keyboard.press("Escape")
    assert tab.get_by_role("dialog").count() == 0
    tab.get_by_role("button", name="Zoom in").click()
    assert view_of(tab)["zoom"] == 1.5


def test_the_wheel_and_the_mouse_move_the_picture(opened):
    tab = opened(page_of([random_scene()])[0])
    x, y = centre_of(tab)
    place = "([x, y]) => { const p = gs2d.placeOf({ clientX: x, clientY: y }); return [p.x, p.y]; }"
    before = tab.evaluate(place, [x + 100, y - 50])
    tab.mouse.move(x + 100, y - 50)
    tab.mouse.wheel(0, -300)
    tab.wait_for_function("gs2d.view.zoom > 1.2")
    assert tab.evaluate(place, [x + 100, y - 50]) == pytest.approx(before)  # what was under the pointer still is
    start = view_of(tab)
    tab.mouse.down()
    tab.mouse.move(x + 40, y - 20, steps=4)
    tab.mouse.up()
    assert tab.evaluate(place, [x + 40, y - 20]) == pytest.approx(before) and view_of(tab)["x"] > start["x"]
    tab.mouse.dblclick(x, y)
    assert view_of(tab)["zoom"] == pytest.approx(2 * start["zoom"])
    start = view_of(tab)
    tab.mouse.down(button="right")  # it opens a menu, which may swallow the end of a drag
    tab.mouse.move(x + 40, y, steps=2)
    tab.mouse.up(button="right")
    assert view_of(tab) == start


def test_two_fingers_zoom(opened):
    tab = opened(page_of([random_scene()])[0], has_touch=True, is_mobile=True, size=(360, 640))
    x, y = centre_of(tab)
    touch = tab.context.new_cdp_session(tab)
    for kind, apart in ("touchStart", 30), ("touchMove", 60), ("touchMove", 90), ("touchEnd", None):
        points = [] if apart is None else [dict(x=x + side * apart, y=y, id=i) for i, side in enumerate((-1, 1))]
        touch.send("Input.dispatchTouchEvent", dict(type=kind, touchPoints=points))
    tab.wait_for_function("Math.abs(gs2d.view.zoom - 3) < 0.05")
    assert abs(view_of(tab)["x"]) < 0.2


def in_a_frame(tab, page):
    "The page as Jupyter shows it, an <iframe srcdoc>, which has no address of its own, on a page that is longer than the screen."
    tab.evaluate("""(html) => { const frame = document.createElement("iframe"); frame.srcdoc = html; frame.sandbox = "allow-scripts";
      frame.style = "display: block; width: 100%; height: 300px; margin: 50px 0 3000px"; document.body.replaceChildren(frame); }""", html_of(page))
    frame = tab.frames[1]
    frame.wait_for_function("window.gs2d")
    frame.evaluate("gs2d.idle()")
    return frame


def test_a_page_in_a_frame_zooms_once_it_was_clicked(opened):
    page, [scene] = page_of([random_scene()])
    tab = opened(page)
    frame = in_a_frame(tab, page)
    assert_same(pixels(frame), expected(scene))
    tab.mouse.move(400, 150)
    tab.mouse.wheel(0, 60)
    tab.wait_for_function("scrollY === 60")
    assert view_of(frame)["zoom"] == 1
    tab.mouse.click(400, 150)
    tab.mouse.wheel(0, -60)
    frame.wait_for_function("gs2d.view.zoom > 1")
    assert tab.evaluate("scrollY") == 60


def test_a_finger_scrolls_the_page_around_a_frame_and_two_take_hold_of_the_picture(opened):
    page, _ = page_of([random_scene()])
    tab = opened(page, has_touch=True, is_mobile=True, size=(360, 640))
    frame, touch = in_a_frame(tab, page), tab.context.new_cdp_session(tab)

    def move(*fingers, steps=6):
        "Fingers, each from a place to a place."
        for i in range(steps + 1):
            points = [dict(x=a + (c - a) * i / steps, y=b + (d - b) * i / steps, id=k) for k, ((a, b), (c, d)) in enumerate(fingers)]
            touch.send("Input.dispatchTouchEvent", dict(type="touchMove" if i else "touchStart", touchPoints=points))
        touch.send("Input.dispatchTouchEvent", dict(type="touchEnd", touchPoints=[]))

    def settled():
        "Waits until the page has rolled out, and what the fingers changed has reached the screen."
        tab.wait_for_function("new Promise((say) => { const y = scrollY; setTimeout(() => say(scrollY === y), 250); })")

    move(((180, 200), (180, 150)))
    tab.wait_for_function("scrollY > 10")
    assert view_of(frame) == dict(x=0, y=0, zoom=1)
    settled()  # a quick finger leaves it rolling, however far
    tab.evaluate("scrollTo(0, 50)")
    settled()
    for _ in range(5):  # a busy machine can be too late to keep fingers from scrolling: then the browser takes them away
        move(((180, 130), (180, 110)), ((180, 170), (180, 190)))
        settled()
        if view_of(frame)["zoom"] > 1.5:
            break
    before = view_of(frame)
    assert before["zoom"] > 1.5
    for _ in range(5):
        scrolled = tab.evaluate("scrollY")
        move(((180, 150), (180, 190)))
        settled()
        if view_of(frame)["y"] > before["y"]:
            break
    assert tab.evaluate("scrollY") == scrolled and view_of(frame)["y"] > before["y"]
    two = "[1, 2].map((identifier) => new Touch({ identifier, target: gs2d.over }))"
    assert not frame.evaluate(f"gs2d.over.dispatchEvent(new TouchEvent('touchmove', {{ cancelable: true, touches: {two} }}))")


def blobs(blend=Blend.WEIGHTED):
    "Three Gaussians apart, and a small one on the third, behind it."
    return Gaussians2D(torch.tensor([[-3.0, 1.0], [0.0, -1.0], [3.0, 1.0], [3.05, 1.0]]), torch.tensor([[-0.5, -1.0]] * 3 + [[-2.0, -2.0]]),
                       torch.tensor([0.5, 0.0, -0.5, 0.0]), torch.tensor([2.0, 2.0, 2.0, 0.0]), torch.rand(4, 3), DOMAIN, blend)


def test_pointing_at_a_gaussian_shows_its_numbers(opened):
    page, [scene] = page_of([blobs(Blend.OVER)])
    scene.requires_grad_(False)
    tab = opened(page)
    card, unit = tab.locator(".gs2d-card"), tab.evaluate("gs2d.unit")
    x, y = centre_of(tab)
    assert card.is_hidden()
    for row in 1, 0, 2:
        mx, my = scene.means[row].tolist()
        tab.mouse.move(x + mx * unit, y - my * unit)
        tab.wait_for_function("(row) => document.querySelector('.gs2d-card dd')?.textContent === row", arg=str(row))
        words = card.inner_text()
        assert f"{scene.scales[row, 0]:.3g}" in words and f"{scene.opacities[row]:.3g}" in words
        assert f"{math.degrees(scene.rotations[row]) % 180:.3g}°" in words
    tab.mouse.move(x, y + unit * 2.5)
    tab.wait_for_function("document.querySelector('.gs2d-card').hidden")
    tab.mouse.click(x, y + unit)  # a click keeps it
    tab.wait_for_function("document.querySelector('.gs2d-card').innerText.includes('share here')")
    tab.evaluate("gs2d.setOptions({ size: 0.5 }); gs2d.idle()")
    assert "share" not in card.inner_text()  # with other Gaussians it would be another one
    tab.mouse.move(x, y + unit * 2.5)
    tab.evaluate("gs2d.idle()")
    assert card.locator("dd").first.inner_text() == "1" and tab.evaluate("gs2d.picked.pinned")
    tab.keyboard.press("Escape")
    tab.evaluate("gs2d.idle()")
    assert card.is_hidden()


def test_what_is_picked_is_what_gives_most(tab):
    def pick(blend, opacities, colors):
        n = len(opacities)
        scene = Gaussians2D(torch.zeros(n, 2), torch.zeros(n, 2), torch.zeros(n), torch.logit(torch.tensor(opacities)),
                            torch.tensor(colors)[:, None].expand(n, 3), DOMAIN, blend)
        show(tab, page_of([scene], exact=True)[0])
        return tab.evaluate("(({ index, share }) => [index, share])(gs2d.pick(0, 0))")

    assert pick(Blend.OVER, [0.6, 0.9], [1.0, 1.0]) == [0, pytest.approx(0.6)]  # the other one lies behind it
    assert pick(Blend.ADDITIVE, [0.5, 0.9], [-0.9, 0.1]) == [0, None]  # it takes more away than the other one adds
    assert pick(Blend.WEIGHTED, [0.2, 0.3], [1.0, 0.0]) == [1, pytest.approx(0.3 / 0.51)]
    assert tab.evaluate("gs2d.pick(4.9, 2.9)") is None


def test_the_view_stays_within_reach(tab):
    show(tab, page_of([random_scene()])[0])
    tab.evaluate("gs2d.setView({ x: 1e9, y: -1e9, zoom: 1e30 })")
    assert view_of(tab) == dict(x=5, y=-3, zoom=1e11)
    tab.evaluate("gs2d.setView({ zoom: 0 })")
    assert view_of(tab)["zoom"] == 0.5
    assert tab.evaluate("(() => { try { gs2d.setView({ x: NaN }); } catch (error) { return error.name; } })()") == "TypeError"


def test_outlines_lie_at_two_standard_deviations(opened):
    scene = Gaussians2D(torch.tensor([[1.0, 0.5]]), torch.tensor([[0.5, 0.25]]).log(), torch.tensor([math.pi / 6]), torch.tensor([-9.0]),
                        torch.zeros(1, 3), DOMAIN, Blend.ADDITIVE)
    tab = opened(page_of([scene], exact=True)[0], '{ "controls": false, "outlines": true }', size=(1000, 600))
    drawn = screenshot(tab.locator(".gs2d-stage")).mean(-1)
    rows, columns = (drawn > 0.3).nonzero().T + 0.5
    turned = torch.stack([columns - 600, 250 - rows], -1) / 100 @ torch.tensor([[3**0.5, -1], [1, 3**0.5]]) / 2
    far = (turned / torch.tensor([0.5, 0.25])).norm(dim=-1)
    assert len(far) > 100 and 1.9 < far.min() and far.max() < 2.1


def test_enter_picks_the_gaussian_in_the_middle(opened):
    tab = opened(page_of([blobs()])[0])
    tab.evaluate("gs2d.setView({ x: -3, y: 1, zoom: 2 })")
    tab.locator(".gs2d-over").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelector('[role=status]').textContent.startsWith('Gaussian 0')")
    assert tab.evaluate("gs2d.picked.index") == 0


def test_all_numbers_of_gaussians_can_be_reached_by_keys(opened):
    tab = opened(page_of([random_scene(7)])[0])
    tab.get_by_label("Gaussians shown").focus()
    seen = []
    for _ in range(12):
        tab.keyboard.press("PageDown")
        tab.evaluate("gs2d.idle()")
        seen.append(tab.evaluate("gs2d.options.shown"))
    assert seen == sorted(seen, reverse=True) and set(seen) >= {1, 2, 3, 4, 5, 6}
    tab.keyboard.press("End")
    tab.evaluate("gs2d.idle()")
    assert tab.evaluate("gs2d.options.shown") is None
    tab.evaluate("gs2d.setOptions({ shown: 3 }); gs2d.idle()")
    assert float(tab.get_by_label("Gaussians shown").input_value()) == pytest.approx(math.log(3, 7), abs=0.005)


def test_wipe_while_zoomed_shows_the_same_part_of_both(opened):
    "A pixel of the picture to reach is a square, and lies where its part of the domain does."
    target = (torch.rand(6, 10, 3, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    page, [scene] = page_of([random_scene()], target=target)
    tab = opened(page, '{ "controls": false, "wipe": 0.25 }', size=(400, 240))
    tab.evaluate("gs2d.setView({ x: 2, y: -1, zoom: 3 }); gs2d.idle()")
    drawn = screenshot(tab.locator(".gs2d-stage"))
    x, y = 2 + (torch.arange(400) + 0.5 - 200) / 120, -1 - (torch.arange(240) + 0.5 - 120) / 120
    shown = target[(3 - y).long()][:, (x + 5).long()]
    right = (drawn - shown)[40:, 104:].abs().amax(-1) < 0.01
    assert right.float().mean() > 0.95  # but for the handle and the edges of the pixels
    assert ((drawn - expected(scene, dict(x=2, y=-1, zoom=3), 400, 240)[..., :3])[40:, :70].abs().amax(-1) < 0.01).all()


@pytest.mark.parametrize("renderer", RENDERERS)
def test_nothing_lies_behind_a_transparent_picture(opened, renderer):
    page, _ = page_of([random_scene()], target=torch.zeros(6, 10, 4))
    tab = opened(page, json.dumps(dict(renderer=renderer, controls=False, wipe=0.5)), size=(400, 300))
    drawn = screenshot(tab.locator(".gs2d-stage"))
    assert (drawn[60:130, 210:] == drawn[10, 390]).all() and drawn[60:130, :190].std() > 0.05


def test_wipe_shows_the_picture_to_reach(opened):
    target = (smooth_picture(120, 200) * 255).round() / 255
    page, [scene] = page_of([random_scene()], target=target)
    tab = opened(page, size=(660, 500))
    tab.get_by_role("button", name="Compare").click()
    tab.evaluate("gs2d.idle()")
    stage, unit = tab.locator(".gs2d-stage"), tab.evaluate("gs2d.unit")
    width, height = round(10 * unit), round(6 * unit)
    drawn = screenshot(stage)
    top, left = (drawn.shape[0] - height) // 2, (drawn.shape[1] - width) // 2
    left_half, right_half = (drawn[top + 20:top + height - 20, left + x:left + x + width // 4] for x in (20, width // 2 + 20))
    wanted = expected(scene, width=width, height=height)[20:-20, 20:20 + width // 4, :3]
    assert (left_half - wanted).abs().mean() < 0.01
    rows, columns = torch.arange(height) * 120 // height, torch.arange(width) * 200 // width
    shown = target[rows][:, columns][20:-20, width // 2 + 20:width // 2 + 20 + width // 4]
    clear = torch.ones(len(shown), dtype=torch.bool)
    clear[len(shown) // 2 - 40:len(shown) // 2 + 40] = False  # the handle
    clear[:30] = False  # the names of both sides
    assert (right_half - shown)[clear].abs().mean() < 0.01
    tab.get_by_label("Where the picture to reach begins").focus()
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate("gs2d.options.wipe") == pytest.approx(0.49)


# ------------------------------------------------------------------------------------- every screen and everybody

@pytest.mark.parametrize("size", [(360, 640), (320, 480), (1280, 720), (700, 240)])
def test_nothing_is_wider_than_the_screen(opened, size):
    tab = opened(recording(target=torch.zeros(6, 10, 3), title="A long title that goes on and on " * 4)[0], size=size)
    assert tab.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert tab.locator(".gs2d-stage").bounding_box()["height"] > 0.3 * size[1]
    for control in tab.locator("button:visible, input:visible").all():
        box = control.bounding_box()
        inside = control.get_attribute("class") == "gs2d-wipe" or (box["x"] >= 0 and box["x"] + box["width"] <= size[0])
        assert inside and box["y"] + box["height"] <= size[1] and min(box["width"], box["height"]) >= 24, control.get_attribute("aria-label")


def test_text_is_as_large_as_the_person_wants_it(opened):
    tab = opened(recording(target=torch.zeros(6, 10, 3))[0], size=(1280, 720))
    tab.evaluate("document.documentElement.style.fontSize = '32px'; gs2d.idle()")
    assert tab.locator(".gs2d-when").evaluate("(node) => getComputedStyle(node).fontSize") == "28px"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
    for control in tab.locator("button:visible").all():
        box, fits = control.bounding_box(), control.evaluate("(node) => node.scrollWidth <= node.clientWidth + 1")
        assert fits and box["x"] + box["width"] <= 1280 and box["y"] + box["height"] <= 720, control.get_attribute("aria-label")


def test_colours_that_the_system_forces_and_paper(opened):
    tab = opened(page_of([random_scene()])[0], forced_colors="active")
    tab.evaluate("gs2d.setOptions({ outlines: true }); gs2d.idle()")
    colors = tab.locator("[aria-pressed]").evaluate_all("(nodes) => nodes.map((node) => getComputedStyle(node).backgroundColor)")
    assert colors[0] != colors[1]
    tab.emulate_media(media="print")
    assert tab.locator(".gs2d-bar").is_hidden()
    widths = tab.locator("canvas").evaluate_all("(nodes) => nodes.map((node) => { node.style.width = '9999px'; return node.offsetWidth; })")
    assert widths == [800, 800]  # paper is narrower than the window, and nothing draws the picture anew for it


def test_a_screen_reader_is_told_names_and_hears_nothing_while_it_plays(tab):
    scene = random_scene(1)
    page, _ = page_of([scene, scene])
    show(tab, page | dict(title=""), "canvas")
    tab.evaluate("plain.idle()")
    root = tab.locator("body > div")
    assert root.locator(".gs2d-scene").get_attribute("aria-label") == "2D Gaussians, a picture made of 1 Gaussian"
    assert root.locator(".gs2d-over").get_attribute("aria-label").startswith("2D Gaussians: plus and minus zoom")
    assert root.locator(".gs2d-when").inner_text() == "step 100 · 21.00 dB · 1 Gaussian"
    assert root.locator("output, [aria-live], [role=status], [role=log]").count() == 1  # the one that speaks when the hands rest


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(opened, scheme):
    tab = opened(recording(target=torch.zeros(6, 10, 3))[0], color_scheme=scheme)
    ground = "getComputedStyle(document.querySelector('.gs2d-viewer')).backgroundColor"
    assert (sum(map(int, re.findall(r"\d+", tab.evaluate(ground))[:3])) > 380) == (scheme == "light")
    tab.evaluate("gs2d.setOptions({ wipe: 0.5, outlines: true }); gs2d.setView({ zoom: 10 }); gs2d.select(0); gs2d.idle()")
    for _ in range(2):
        found = Axe().run(tab).response["violations"]
        bad = [(rule["id"], rule["nodes"][0]["html"]) for rule in found if rule["impact"] in ("serious", "critical")]
        assert not bad, bad
        tab.keyboard.press("?")


# --------------------------------------------------------------------------------------------- where it goes wrong

WITHOUT = """for (const [name, old] of [["getContext", HTMLCanvasElement.prototype.getContext]])
  HTMLCanvasElement.prototype[name] = function (kind, ...rest) { return %s.includes(kind) ? null : old.call(this, kind, ...rest); };"""


def test_a_lost_context_is_replaced(opened):
    page, [scene] = page_of([random_scene()])
    tab = opened(page)
    tab.evaluate("window.old = gs2d.painter; old.gl.getExtension('WEBGL_lose_context').loseContext()")
    tab.wait_for_function("gs2d.painter !== old")
    tab.evaluate("gs2d.idle()")
    assert tab.locator(".gs2d-scene").count() == 1
    assert_same(pixels(tab), expected(scene))


def test_without_webgl2_it_draws_on_a_plain_canvas(opened):
    page, [scene] = page_of([random_scene()])
    tab = opened(page, script=WITHOUT % '["webgl2"]')
    assert tab.evaluate("gs2d.renderer") == "canvas"
    assert_same(pixels(tab), expected(scene))


def inflated(page):
    return zlib.decompress(base64.b64decode(page["data"]))


@pytest.mark.parametrize("words, changes", [
    ("not a gs2d page", lambda page: dict(format="something")),
    ("version 2", lambda page: dict(version=2)),
    ("damaged", lambda page: dict(data=page["data"][: len(page["data"]) // 2])),
    ("damaged", lambda page: dict(data="<b>no base64</b>")),
    ("damaged", lambda page: dict(data=deflated(inflated(page)[:-1]))),
    ("damaged", lambda page: dict(data=deflated(inflated(page) + b"\0"))),
    ("damaged", lambda page: dict(n=10**9)),
    ("damaged", lambda page: dict(n="7")),
    ("damaged", lambda page: dict(moments=[])),
    ("damaged", lambda page: dict(fields=page["fields"][::-1])),
    ("damaged", lambda page: dict(x_dim=[5, -5])),
    ("damaged", lambda page: dict(data=deflated(inflated(page)[:28] + struct.pack("<7i", 6, 5, 4, 3, 2, 1, 99) + inflated(page)[56:]))),
])
def test_a_damaged_page_says_so_in_one_sentence(tab, words, changes):
    page, _ = recording()
    said = tab.evaluate("""async (page) => { const root = document.body.appendChild(document.createElement("div"));
      const threw = await tools.mount(root, page).then(() => false, () => true), alert = root.querySelector("[role=alert]");
      root.remove(); return [threw, alert?.textContent, root.childElementCount]; }""", {**page, **changes(page)})
    assert said[0] and words in said[1] and said[2] == 1


def test_an_old_browser_is_told_so(opened):
    page, _ = page_of([random_scene()])
    tab = opened(page, fails=True, script="delete window.DecompressionStream")
    assert "too old" in tab.get_by_role("alert").inner_text()
    tab = opened(page, fails=True, script=WITHOUT % '["webgl2", "2d"]')
    assert "neither" in tab.get_by_role("alert").inner_text()


def test_what_a_page_says_is_text(opened):
    title = "</script><img src=x onerror='window.hacked = 1'><b>bold</b>"
    page, _ = page_of([random_scene()], title=title)
    tab = opened(page | dict(target="https://example.org/picture.png"))  # which nobody asks for
    assert tab.locator(".gs2d-title strong").inner_text() == title
    assert tab.locator(".gs2d-viewer b, .gs2d-viewer img").count() == 0 and not tab.evaluate("window.hacked")


def test_a_viewer_takes_another_page_and_goes_away(opened):
    page, _ = page_of([random_scene()])
    tab = opened(page)
    tab.evaluate("gs2d.setView({ x: 1, y: 1, zoom: 3 })")
    other, scenes = recording()
    tab.evaluate("async (page) => { await gs2d.load(page); await gs2d.idle(); }", other)
    assert view_of(tab) == dict(x=1, y=1, zoom=3) and tab.get_by_role("button", name="Play").is_visible()
    assert_same(pixels(tab), expected(scenes[-1]))
    tab.evaluate("gs2d.destroy()")
    assert tab.locator("#gs2d-viewer").evaluate("(root) => root.childElementCount") == 0
    tab.keyboard.press("+")
    assert not tab.errors


def test_an_empty_scene_is_its_background(tab):
    page, [scene] = page_of([random_scene(1)], births=[1], deaths=[1])
    assert_same(pixels(tab, name=show(tab, page)), expected(scene))


def test_script_and_styles_are_small():
    assert sum((SHOW / name).stat().st_size for name in ("viewer.js", "viewer.css")) < 65_000  # a page may have 100 KB beside its data
