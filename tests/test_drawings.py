"""Scenes as drawings for other programs, in Chromium: the shader is the picture of `render`, and the SVG is near it."""
import base64
import io
import shutil

import numpy as np
import pytest
import torch
from conftest import make_scene
from PIL import Image

from gs2d.gaussians import CUTOFF_WEIGHT, MAX_ALPHA, WEIGHT_EPS, Blend, Domain2D, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.io import scene_glsl
from gs2d.io.scene_glsl import to_glsl
from gs2d.io.scene_record import record_of
from gs2d.io.scene_svg import to_svg
from gs2d.renderer import render

SHADERTOY = """async ([fragment, height, width]) => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const gl = canvas.getContext("webgl2", {preserveDrawingBuffer: true}), program = gl.createProgram();
  const head = "#version 300 es\\nprecision highp float;\\nuniform vec3 iResolution;\\nout vec4 color;\\n";
  for (const [kind, text] of [
    [gl.VERTEX_SHADER, "#version 300 es\\nvoid main() { gl_Position = vec4(gl_VertexID == 1 ? 3 : -1, gl_VertexID == 2 ? 3 : -1, 0, 1); }"],
    [gl.FRAGMENT_SHADER, head + fragment + "\\nvoid main() { mainImage(color, gl_FragCoord.xy); }"]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  gl.useProgram(program);
  gl.viewport(0, 0, width, height);
  gl.uniform3f(gl.getUniformLocation(program, "iResolution"), width, height, 1);
  gl.drawArrays(gl.TRIANGLES, 0, 3);
  return canvas.toDataURL("image/png").split(",")[1];
}"""


@pytest.fixture(scope="module")
def page():
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium")
    assert browser_path, "these tests need Chromium: `make browser` installs it"
    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--force-color-profile=srgb",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=flags)
        yield browser.new_page()
        browser.close()


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.float64) / 255


def wanted(scene, height, width):
    image = render(scene, height, width).detach().clamp(0, 1).double().numpy()
    return np.broadcast_to(image, (height, width, 3))


def shader_picture(page, scene, height, width):
    png = page.evaluate(SHADERTOY, [to_glsl(record_of(scene)).decode(), height, width])
    return pixels(base64.b64decode(png))


def svg_picture(page, scene, height, width):
    page.set_viewport_size({"width": width, "height": height})
    page.set_content(f'<body style="margin:0">{to_svg(record_of(scene, height, width)).decode()}')
    return pixels(page.screenshot())


def decibels(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2))


# ── the shader ────────────────────────────────────────────────────────────────

def test_its_constants_are_those_of_the_renderer():
    assert (scene_glsl.KAPPA, scene_glsl.EPSILON, scene_glsl.MOST_OPAQUE) == (CUTOFF_WEIGHT, WEIGHT_EPS, MAX_ALPHA)


@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("n", [0, 1, 200])
def test_the_shader_draws_what_render_draws(page, blend, n):
    domain = Domain2D.for_image(90, 120)
    scene = GroundTruth.random(n, 90, 120, seed=1, blend=blend).scene if n else make_scene(0, domain=domain, blend=blend)
    scene.background = (0.2, 0.1, 0.4)
    for height, width in ((90, 120), (37, 61)):
        difference = np.abs(shader_picture(page, scene, height, width) - wanted(scene, height, width)) * 255
        assert difference.max() <= 2, f"{difference.max():.1f} of 255"


@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("channels", [1, 3])
def test_the_shader_of_an_awkward_scene(page, blend, channels):
    "Colours beyond 0 and 1, thin and huge Gaussians, and some far outside, in a domain far from 0."
    scene = make_scene(60, domain=Domain2D((995, 1005), (-4, 4)), channels=channels, blend=blend, background=(0.5,) * channels)
    with torch.no_grad():
        scene.means[:, 0] += 1000
        scene.log_scales[:4] = torch.tensor([[-6.0, 0], [12, 12], [-3, 4], [-30, -30]])
        scene.means[5:8] = torch.tensor([[1e30, 0], [1000, 1e38], [1100.0, 3]])
    exact = Gaussians2D(*(values.double() for values in scene.parameters()), scene.domain, blend, scene.background)
    difference = np.abs(shader_picture(page, scene, 60, 80) - wanted(exact, 60, 80)) * 255
    assert difference.max() <= 2, f"{difference.max():.1f} of 255"


def test_a_shader_of_a_thousand_compiles_and_one_more_is_refused(page, tmp_path):
    scene = GroundTruth.random(1001, 30, 40, seed=0).scene
    with pytest.raises(ValueError, match="at most 1,000 Gaussians.*nothing was saved"):
        scene.save(tmp_path / "x.glsl")
    fewer = Gaussians2D(*(values[:1000] for values in scene.parameters()), scene.domain, scene.blend)
    assert np.abs(shader_picture(page, fewer, 30, 40) - wanted(fewer, 30, 40)).max() * 255 <= 2


@pytest.mark.parametrize("suffix", [".svg", ".glsl"])
@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_no_screen_has(tmp_path, suffix, channels):
    with pytest.raises(ValueError, match="colors: expected 1 or 3 channels"):
        make_scene(3, channels=channels).save(tmp_path / f"x{suffix}")


# ── SVG ───────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("blend, least", [("over", 40), ("additive", 40), ("weighted", 18)])
def test_an_svg_of_colours_from_0_to_1_is_near(page, blend, least):
    scene = GroundTruth.random(100, 90, 120, seed=2, blend=blend).scene
    assert decibels(svg_picture(page, scene, 90, 120), wanted(scene, 90, 120)) > least


def fitted_like(blend):
    "Colours below 0 and above 1, as fits have them."
    scene = GroundTruth.random(150, 90, 120, seed=3, blend=blend).scene
    with torch.no_grad():
        scene.colors.copy_(1.6 * scene.colors - 0.3)
    scene.background = (0.4, 0.5, 0.6)
    return scene


@pytest.mark.parametrize("blend, least", [("over", 30), ("additive", 30), ("weighted", 16)])
def test_an_svg_of_colours_beyond_0_and_1_is_near(page, blend, least):
    scene = fitted_like(blend)
    assert decibels(svg_picture(page, scene, 90, 120), wanted(scene, 90, 120)) > least


def test_layers_for_an_average_are_better_than_laying_them_over_each_other(page):
    scene = fitted_like("weighted")
    picture = wanted(scene, 90, 120)
    near = decibels(svg_picture(page, scene, 90, 120), picture)
    scene.blend = Blend.OVER
    assert near > decibels(svg_picture(page, scene, 90, 120), picture) + 2


def test_an_svg_says_that_it_is_an_approximation_and_has_its_size(page):
    for scene, size in ((GroundTruth.random(3, 90, 120, seed=0).scene, (512, 384)), (make_scene(2, domain=Domain2D((0, 1), (0, 4))), (128, 512))):
        text = to_svg(record_of(scene)).decode()
        assert "An approximation" in text and f'width="{size[0]}" height="{size[1]}"' in text
        page.set_content(text)
        assert page.evaluate("document.querySelector('svg').getAttribute('viewBox')") == f"0 0 {size[0]} {size[1]}"


@pytest.mark.parametrize("blend", list(Blend))
def test_an_svg_of_an_awkward_scene_is_whole(page, blend):
    scene = make_scene(30, blend=blend, background=(0, 1, -7))
    with torch.no_grad():
        scene.log_scales[:4] = torch.tensor([[-80.0, 80], [80, 80], [-80, -80], [5, 5]])
        scene.means[5:7] = torch.tensor([[1e30, 0], [0, 1e38]])
        scene.colors[8:10] = torch.tensor([[1e38, -1e38, 0], [1e-30, 0, 0]])
    text = to_svg(record_of(scene, 40, 40)).decode()
    assert "nan" not in text and "inf" not in text
    svg_picture(page, scene, 40, 40)
