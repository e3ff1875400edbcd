"""Views: each shows what it says, at the size that was asked for."""
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from gs2d.gaussians import Domain2D, Gaussians2D
from gs2d.ground_truth import GroundTruth
from gs2d.io.pictures import to_pil
from gs2d.renderer import render
from gs2d.results import comparison, error_map
from gs2d.show import views
from gs2d.show.views import (
    ERROR_FULL_SCALE, LEGENDS, View, draw_caption, draw_curve, draw_view, encode, overlay_outlines)
from gs2d.train import StepRecord

TRUTH = GroundTruth.random(6, 24, 32, seed=1)
SCENE = GroundTruth.random(6, 24, 32, seed=2).scene
IMAGE = render(SCENE, 24, 32, TRUTH.blend, TRUTH.background).detach()
VIRIDIS_0 = [68, 1, 84]


# --- outlines -------------------------------------------------------------------------------------


def test_outlines_go_where_the_ellipses_are():
    scene = Gaussians2D.from_values([[0, 2]], [[2, 0.5]], [math.pi / 2], [1], [[1, 1, 1]])  # upright, y up
    bright = overlay_outlines(np.zeros((200, 200, 3), np.uint8), scene).any(-1)
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    assert np.allclose([columns.min() + 0.5, columns.max() + 0.5], [80, 120], atol=1.5)  # 0 ± 2·0.5, 20 pixels a unit
    assert np.allclose([rows.min() + 0.5, rows.max() + 0.5], [0, 140], atol=1.5)  # 2 ± 2·2, the top end is outside
    none, one = torch.zeros(0), torch.zeros(1)
    empty = Gaussians2D.from_values(torch.zeros(0, 2), torch.ones(0, 2), none, none, torch.zeros(0, 3))
    means, log_scales = torch.tensor([[1e30, math.nan]]), torch.tensor([[80.0, -80.0]])
    wild = Gaussians2D(means, log_scales, one, one, torch.full((1, 3), 1e9))
    for other in (empty, wild):
        assert overlay_outlines(np.zeros((20, 20, 3), np.uint8), other).shape == (20, 20, 3)


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", View)
def test_every_view_has_the_size_of_what_is_shown_and_shows_something(view):
    pixels = draw_view(SCENE, IMAGE, TRUTH.image, view)
    panels = 2 if view is View.SIDE_BY_SIDE else 1
    assert pixels.dtype == np.uint8 and pixels.shape == (288, 384 * panels, 3) and pixels.std() > 5
    assert np.array_equal(draw_view(SCENE, IMAGE, TRUTH.image, view.value), pixels)
    assert draw_view(SCENE, IMAGE, TRUTH.image, view, scale=2).shape == (48, 64 * panels, 3)
    assert LEGENDS[view] and view.label


def test_render_and_target_are_enlarged_pixel_for_pixel():
    for view, image in ((View.RENDER, IMAGE), (View.TARGET, TRUTH.image)):
        assert np.array_equal(draw_view(SCENE, IMAGE, TRUTH.image, view, scale=1), np.asarray(to_pil(image)))
        assert np.array_equal(draw_view(SCENE, IMAGE, TRUTH.image, view)[6::12, 6::12], np.asarray(to_pil(image)))


def test_the_error_map_is_dark_for_no_error_and_yellow_from_a_quarter_on():
    assert (draw_view(SCENE, TRUTH.image, TRUTH.image, View.ERROR, 1) == VIRIDIS_0).all()
    bright = draw_view(SCENE, (TRUTH.image + 0.5) % 1.0, TRUTH.image, View.ERROR, 1).reshape(-1, 3).max(0)
    assert bright[0] > 240 and bright[1] > 220, "the end of viridis, red first"
    grey = torch.full((2, 2, 3), 0.5)
    half = draw_view(SCENE, grey + ERROR_FULL_SCALE / 2, grey, View.ERROR, 1)[0, 0]
    assert np.abs(half.astype(int) - [33, 145, 140]).max() <= 3, "the middle of viridis"


def test_the_error_is_the_mean_over_the_channels_of_clamped_pictures():
    image, target = torch.tensor([[[1.5, 0.0, 0.3]]]), torch.tensor([[[0.4, -1.0, 0.0]]])
    assert error_map(image, target).item() == pytest.approx((0.6 + 0.0 + 0.3) / 3)
    assert error_map(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)).tolist() == [[1.0] * 3] * 2  # with a fourth channel


def test_side_by_side_puts_any_views_in_a_row_or_below_each_other_where_they_are_wide():
    row = (View.RENDER, View.TARGET, View.ERROR)
    titled = draw_view(SCENE, IMAGE, TRUTH.image, "side_by_side", 4, row, titles=True)
    assert titled.shape == (96 + 20, 3 * 128 + 2 * 8, 3)
    for k, view in enumerate(row):
        panel = titled[20:, k * 136:k * 136 + 128]
        assert np.array_equal(panel, draw_view(SCENE, IMAGE, TRUTH.image, view, 4))
    wide = draw_view(SCENE, torch.rand(8, 60, 3), torch.rand(8, 60, 3), "side_by_side", 1, row, titles=True)
    assert wide.shape == (3 * (8 + 20), 60, 3)
    pair = draw_view(SCENE, IMAGE, TRUTH.image, "side_by_side", 1)
    assert np.array_equal(pair[:, :32], np.asarray(TRUTH.to_pil()))
    assert np.array_equal(pair[:, 32:], np.asarray(to_pil(IMAGE)))


def test_outlines_lie_at_two_standard_deviations_with_y_up():
    domain = Domain2D.for_image(100, 100)
    scene = Gaussians2D.from_values([[1.0, 2.0]], [[1.0, 0.5]], [0.0], [0.9], [[1.0, 0.0, 0.0]], domain)
    black = torch.zeros(100, 100, 3)
    rows, columns = np.nonzero(draw_view(scene, black, black, View.OUTLINES)[..., 0])
    found = np.array([columns.min(), columns.max(), rows.min(), rows.max()]) / 400 * 10 - [5, 5, 5, 5]
    expected = [1 - 2, 1 + 2, -2 - 1, -2 + 1]  # in domain units, rows counted downwards
    assert np.abs(found - expected).max() < 0.06, "two pixels of the enlarged picture"


def test_gaussians_at_their_opacity_are_grey_where_none_is():
    faint = Gaussians2D.from_values([[0.0, 0.0]], [[1.0, 1.0]], [0.0], [0.01], [[1.0, 0.0, 0.0]])
    solid = Gaussians2D.from_values([[0.0, 0.0]], [[1.0, 1.0]], [0.0], [0.98], [[1.0, 0.0, 0.0]])
    black = torch.zeros(33, 33, 3)
    middles = [draw_view(scene, black, black, View.OPACITY, 1) for scene in (faint, solid)]
    assert np.abs(middles[0].astype(int) - 128).max() <= 3
    assert middles[1][16, 16, 0] > 240 and middles[1][16, 16, 1] < 12 and (middles[1][0] == middles[1][0, 0]).all()


def test_large_pictures_are_shrunk_and_numbers_that_are_none_do_not_break_the_view():
    target = torch.rand(4, 1600, 3)
    assert draw_view(SCENE, target, target, View.TARGET).shape == (2, 768, 3)
    for view in View:
        draw_view(SCENE, torch.full((4, 1600, 3), torch.nan), target, view)


def test_a_view_that_is_none():
    with pytest.raises(ValueError, match="view: expected one of 'render', .*, got 'heatmap'"):
        draw_view(SCENE, IMAGE, TRUTH.image, "heatmap")


# --- strips, curves, figures ----------------------------------------------------------------------


def test_every_number_of_the_caption_changes_its_pixels():
    numbers = [((1, 0.5, 20.0), 7), ((2, 0.5, 20.0), 7), ((1, 0.4, 20.0), 7), ((1, 0.5, 21.0), 7), ((1, 0.5, 20.0), 8),
               ((1, 0.0, math.inf), 7), ((1, 1e-7, 70.0), 7)]
    strips = [draw_caption(StepRecord(*values, 0.0, n, 0.0), 500) for values, n in numbers]
    assert len({strip.tobytes() for strip in strips}) == len(strips)


def test_the_curve_falls_with_the_loss_and_survives_any_loss():
    falling = draw_curve([(k, 0.5 * 0.9**k) for k in range(20)], 40, 200, 72)
    line = (falling == views._LINE).all(-1)
    columns = [np.flatnonzero(line[:, x]).mean() for x in np.flatnonzero(line.any(0))]
    assert columns[0] < columns[len(columns) // 2] < columns[-1]  # down the picture
    assert np.flatnonzero(line.any(0)).max() < 110  # half of the steps are still to come
    odd = [], [(0, 0.0)], [(0, math.nan), (1, math.inf)], [(0, 0.3)], [(0, 0.3), (1, 0.3)], [(5, -1.0), (6, 2.0)]
    for losses in odd:
        assert draw_curve(losses, 10, 130, 48).shape == (48, 130, 3)


def test_a_long_history_is_thinned_out_with_both_ends():
    history = [StepRecord(k, 1 / (k + 1), 0.0, 0.0, 1, 0.0) for k in range(5000)]
    losses = views._losses(history)
    assert len(losses) == 400 and losses[0][0] == 0 and losses[-1][0] == 4999 and losses == sorted(losses)
    assert views._losses([]) == [] and views._losses(history[:1]) == [(0, 1.0)]
    assert len(views._losses(history[:400])) == 400


def test_png_is_exact_and_jpeg_is_small():
    pixels = draw_view(SCENE, IMAGE, TRUTH.image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(pixels, ".png")))), pixels)
    jpeg = np.asarray(Image.open(io.BytesIO(encode(pixels, ".jpg"))))
    assert np.abs(jpeg.astype(int) - pixels).mean() < 4  # red is not taken for blue


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size, panels", [
    ((40, 20), (1, 4)), ((20, 30), (2, 2)), ((8, 64), (4, 1)), ((1, 200), (4, 1))])
def test_comparison_suits_the_proportions_and_shares_the_error(size, panels, channels):
    image, target = torch.rand(*size, channels), torch.rand(*size, channels)
    figure = comparison(SCENE, image, target, "6 Gaussians")
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == ["target", "6 Gaussians", "error (mean absolute)", "outlines at 2σ"]
    assert axes[0].get_subplotspec().get_geometry()[:2] == panels and max(figure.get_size_inches() * figure.dpi) < 2000
    shown, = axes[2].images
    low, high = shown.get_clim()
    assert low == 0 and 1 / 255 <= high <= max(1 / 255, float(error_map(image, target).amax()))
    assert shown.cmap.name == "viridis" and shown.colorbar is not None
    assert np.allclose(shown.get_array(), error_map(image, target))
