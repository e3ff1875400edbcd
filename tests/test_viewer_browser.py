"""The viewer as a person meets it: a page opened from a file, in Chromium, with the network off. Without Chromium this fails.

What is drawn is held to `render` of the very numbers that the page stores, after they were rounded. The viewer says when it has
drawn (`idle`), and every wait here waits for that, or for words on the page.
"""
import base64
import json
import math
import shutil
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import smooth_picture
from PIL import Image
from playwright.sync_api import sync_playwright

import gs2d
from gs2d.gaussians import CUTOFF_POWER, MAX_ALPHA, PARAMETER_NAMES, WEIGHT_EPS, Blend, Domain2D, Gaussians2D
from gs2d.renderer import render

SHOW = Path(gs2d.__file__).parent / "show"
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--force-color-profile=srgb"]
BITS = dict(means=16, log_scales=12, rotations=10, opacity_logits=10, colors=10)
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


def stored(values, low, high, bits):
    "The whole numbers a page keeps, and the values they stand for."
    q = np.round((values - low) / (high - low) * (2**bits - 1)).astype(np.int64)
    return q, low + (high - low) * q / (2**bits - 1)


def page_of(scenes, births=None, deaths=None, parents=None, target=None, bits=BITS, **header):
    "A page's header, and the scenes as it stores them. The scenes hold all identities; births and deaths say who is there when."
    first, moments, k = scenes[0], len(scenes), len(scenes[0])
    births = np.array([0] * k if births is None else births)
    deaths = np.array([moments] * k if deaths is None else deaths)
    parents = np.array([-1] * k if parents is None else parents)
    alive = [[i for i in range(k) if births[i] <= m < deaths[i]] for m in range(moments)]
    stream = [births.astype("<u2").tobytes(), deaths.astype("<u2").tobytes(), parents.astype("<i4").tobytes()]
    fields, kept = [], [{} for _ in scenes]
    for name in PARAMETER_NAMES:
        raw = np.stack([getattr(scene, name).detach().double().numpy().reshape(k, -1) for scene in scenes])
        low, high = raw.min((0, 1)), raw.max((0, 1)) + 1e-3
        fields.append(dict(name=name, channels=raw.shape[-1], low=low.tolist(), high=high.tolist(), bits=bits[name]))
        q, back = stored(raw, low, high, bits[name]) if bits[name] < 32 else (None, raw.astype("f4").astype("f8"))
        for m in range(moments):
            values = torch.tensor(back[m, alive[m]])
            kept[m][name] = values if getattr(first, name).ndim == 2 else values[:, 0]
        for c in range(raw.shape[-1]):
            if q is None:
                stream.append(b"".join(raw[m, alive[m], c].astype("<f4").tobytes() for m in range(moments)))
                continue
            deltas = []
            for m in range(moments):
                for i in alive[m]:
                    before = q[m - 1, i if births[i] < m else parents[i], c] if births[i] < m or parents[i] >= 0 else 0
                    d = (q[m, i, c] - before + 2**15) % 2**16 - 2**15
                    deltas.append((2 * d if d >= 0 else -2 * d - 1) & 0xFFFF)
            deltas = np.array(deltas, "<u2")
            stream += [(deltas & 255).astype("u1").tobytes(), (deltas >> 8).astype("u1").tobytes()]
    constants = dict(cutoff_power=CUTOFF_POWER, floor=first.blend.floor, eps=WEIGHT_EPS, max_alpha=MAX_ALPHA)
    page = dict(
        format="gs2d-page", version=1, title="a scene", n=k, channels=first.colors.shape[-1], x_dim=first.domain.x_dim,
        y_dim=first.domain.y_dim, blend=first.blend.value, background=first.background, width=WIDTH, height=HEIGHT, target=target,
        constants=constants, moments=[dict(step=100 * m, loss=1 / (1 + m), psnr=20.0 + m, n=len(alive[m])) for m in range(moments)],
        fields=fields, data=base64.b64encode(zlib.compress(b"".join(stream))).decode())
    look = first.domain, first.blend, first.background
    return page | header, [Gaussians2D(*(values[name] for name in PARAMETER_NAMES), *look) for values in kept]


def html_of(page, options="{}"):
    "The whole page, as it is written to a file."
    header = json.dumps(page).replace("<", "\\u003c")
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>test</title><style>{(SHOW / "viewer.css").read_text()}</style></head><body>
<main class="gs2d-viewer" id="gs2d-viewer"></main><script type="application/json" id="gs2d-page">{header}</script>
<script type="module">{(SHOW / "viewer.js").read_text()}
window.tools = {{ decode, sceneAt, mount, Viewer }};
window.gs2d = await mount(document.getElementById("gs2d-viewer"),
  JSON.parse(document.getElementById("gs2d-page").textContent), {options});
</script></body></html>"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    "A function that opens a page from a file, with the network off, and gives what a person and a program can do there."
    contexts = []

    def open_page(page, options="{}", fails=False, **context_options):
        context = browser.new_context(viewport=dict(width=800, height=600), **context_options) if "viewport" not in context_options \
            else browser.new_context(**context_options)
        contexts.append(context)
        context.set_offline(True)
        tab = context.new_page()
        tab.requests, tab.errors = [], []
        tab.on("request", lambda request: tab.requests.append(request.url))
        tab.on("pageerror", lambda error: tab.errors.append(str(error)))
        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(page if isinstance(page, str) else html_of(page, options))
        tab.goto(path.as_uri())
        tab.wait_for_selector("[role=alert]" if fails else ".gs2d-scene[aria-label]")
        if not fails:
            tab.wait_for_function("window.gs2d")
            assert not tab.errors, tab.errors
        return tab

    yield open_page
    for context in contexts:
        for tab in context.pages:
            assert all(url.startswith(("file://", "data:")) for url in tab.requests), tab.requests
        context.close()


def pixels(tab, width=WIDTH, height=HEIGHT, view=None):
    "(H, W, 4) what the viewer draws at that size, in [0, 1]."
    code = """([w, h, view]) => { const bytes = gs2d.pixels(w, h, view); let text = "";
      for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096)); return btoa(text); }"""
    raw = base64.b64decode(tab.evaluate(code, [width, height, view or {}]))
    return torch.tensor(list(raw), dtype=torch.float32).reshape(height, width, 4) / 255


def expected(scene, width=WIDTH, height=HEIGHT, view=None):
    "(H, W, 4) what `render` draws there: a part of the domain is a domain."
    if view:
        x, y, w, h = view["x"], view["y"], DOMAIN.width / view["zoom"] / 2, DOMAIN.height / view["zoom"] / 2
        scene = Gaussians2D(*(getattr(scene, name) for name in PARAMETER_NAMES), Domain2D((x - w, x + w), (y - h, y + h)), scene.blend,
                            scene.background)
    image = render(scene, height, width, backend="reference").detach().float().clamp(0, 1)
    if image.shape[-1] == 1:
        image = image.expand(-1, -1, 3)
    return image if image.shape[-1] == 4 else torch.cat([image, torch.ones(height, width, 1)], -1)


def assert_same(tab, scene, view=None):
    difference = (pixels(tab, view=view) - expected(scene, view=view)).abs().max()
    assert difference <= 2 / 255, f"{float(difference) * 255:.1f} levels"


# --------------------------------------------------------------------------------------------- what is drawn

VIEWS = [None, dict(x=1.3, y=-0.7, zoom=4.0)]


@pytest.mark.parametrize("renderer", ["webgl2", "canvas"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("blend", list(Blend))
def test_the_picture_is_that_of_render(opened, blend, channels, renderer):
    page, [scene] = page_of([random_scene(channels=channels, blend=blend)])
    tab = opened(page, json.dumps(dict(renderer=renderer)))
    assert tab.evaluate("gs2d.renderer") == renderer
    for view in VIEWS:
        assert_same(tab, scene, view)
