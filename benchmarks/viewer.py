"""Measure how many frames a second the viewer draws: `python benchmarks/viewer.py`.

Chromium without a screen, whose WebGL2 is a program here (SwiftShader), not a graphics card: what is printed is a lower bound for
one. Every frame has another view, and is waited for. Seconds are of this machine, now.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from run import machine, make_scene

from gs2d.io.pages import to_html
from gs2d.io.scene_record import record_of

FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
MOUNT = "JSON.parse(page));"  # how a page calls the viewer
FRAMES = """async ([seconds, scale]) => {
  const times = [], start = performance.now(), byte = new Uint8Array(4), { gl } = gs2d.painter;
  for (let frame = 0; performance.now() < start + 1000 * seconds || frame < 4; frame++) {
    const before = performance.now();
    gs2d.setView({ x: Math.sin(frame), y: Math.cos(frame), zoom: 1 + 0.1 * Math.sin(frame) });
    gs2d.draw(scale);
    if (gl) gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, byte);  // returns when it is drawn
    times.push(performance.now() - before);
  }
  return times.slice(1).sort((a, b) => a - b)[Math.floor((times.length - 1) / 2)];
}"""


def measure(browser, html, size, seconds, scale):
    "Median milliseconds of a frame."
    tab = browser.new_page(viewport=dict(width=size[0], height=size[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(html)
        tab.goto(path.as_uri())
        tab.wait_for_function("window.gs2d")
    try:
        return tab.evaluate(FRAMES, [seconds, scale])
    finally:
        tab.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaussians", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--size", type=int, nargs=2, default=[1280, 720], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    width, height = options.size
    print(f"{machine()}\n\n| Gaussians | σ in pixels | renderer | frames a second | while moving, at half the pixels a side |")
    print("|---:|---:|---|---:|---:|")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for n in options.gaussians:
            sigma = 0.7 * (width * height / n) ** 0.5  # so that they cover the picture as a fit of a photograph does
            html = to_html(record_of(make_scene(n, height, width, sigma))).decode()
            assert html.count(MOUNT) == 1
            for renderer, name in ("webgl2", "WebGL2, in software"), ("canvas", "plain canvas"):
                page = html.replace(MOUNT, f"JSON.parse(page), {{ renderer: '{renderer}', controls: false }});")
                fps = [1000 / measure(browser, page, options.size, options.seconds, scale) for scale in (1, 0.5)]
                print(f"| {n:,} | {sigma:.1f} | {name} | {fps[0]:.1f} | {fps[1]:.1f} |", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
