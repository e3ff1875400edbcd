"""Scene files: what is written can be read again, bit for bit, and what could not be is refused."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import make_scene
from torch.testing import assert_close

from gs2d.gaussians import WEIGHT_EPS, PARAMETER_NAMES, Blend, Domain2D, Gaussians2D, conics, gaussian_weights
from gs2d.io.files import atomic_write
from gs2d.io.scenes import BLENDS, FORMATS, read_scene, record_of, write_scene
from gs2d.renderer import render

FLAT = {
    "x_dim": [-5, 5], "y_dim": [-3, 3], "res_x": 100, "res_y": 60, "N": 2, "dims": 2,
    "alphas": [[0.9, 0.5, 0.1], [-0.1, 0.2, 0.3]], "centers": [[0, 1.5], [1, -1]], "sigmas": [[2, 0.4], [1, 1]], "thetas": [0.1, 0],
}


@pytest.mark.parametrize("blend", list(Blend))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_saved_scene_renders_the_same_bytes(tmp_path, blend, channels):
    background = (0.1, 0.2, 0.3, 0.4)[:channels]
    scene = make_scene(40, domain=Domain2D.for_image(30, 50), channels=channels, blend=blend, background=background)
    path = scene.save(tmp_path / "scene.json", height=30, width=50)
    record, again = read_scene(path), Gaussians2D.load(path)
    assert (record.height, record.width, record.blend, record.background) == (30, 50, blend.value, background)
    assert (again.domain, again.blend, again.background) == (scene.domain, blend, background)
    for name in PARAMETER_NAMES:
        assert torch.equal(getattr(scene, name), getattr(again, name)), name
    look = again.blend, again.background
    assert torch.equal(render(scene, 30, 50, blend, background), render(again, 30, 50, *look))


def test_extreme_opacities_render_the_same_after_the_round_trip(tmp_path):
    scene = make_scene(6)
    with torch.no_grad():
        scene.opacity_logits.copy_(torch.tensor([-200.0, -90, -20, 18, 30, 200]))
    again = Gaussians2D.load(scene.save(tmp_path / "scene.json"))
    assert torch.equal(scene.opacities, again.opacities)
    assert torch.equal(render(scene, 9, 9), render(again, 9, 9))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_empty_scene_survives_the_round_trip(tmp_path, channels):
    again = Gaussians2D.load(make_scene(0, channels=channels).save(tmp_path / "empty.json"))
    assert len(again) == 0 and again.colors.shape == (0, channels)


def test_flat_file_is_an_additive_scene_with_y_up(tmp_path):
    path = tmp_path / "flat.json"
    path.write_text(json.dumps(FLAT))
    file, scene = read_scene(path), Gaussians2D.load(path)
    assert file.blend == "additive" and file.background == (0, 0, 0) and (file.height, file.width) == (60, 100)
    assert torch.equal(scene.opacities, torch.ones(2))
    assert_close(scene.colors.detach(), torch.tensor(FLAT["alphas"]))
    image = render(scene, file.height, file.width, file.blend)
    assert image[:30].sum() > 3 * image[30:].sum()  # the strong one is at y = +1.5: in the upper half


def test_saved_file_has_the_documented_keys(tmp_path):
    document = json.loads(make_scene(2).save(tmp_path / "s.json", height=4, width=8).read_text())
    assert set(document) == set(FLAT) | {"format", "version", "blend", "background", "opacities", "colors"}
    assert (document["res_x"], document["res_y"], document["N"]) == (8, 4, 2)


def version_1(scene, path):
    "The file of a scene as it was written before weights ended at 0."
    document = json.loads(scene.save(path).read_text())
    path.write_text(json.dumps(document | {"version": 1}))
    return path


def test_a_weighted_scene_of_version_1_is_converted_with_a_sentence(tmp_path):
    scene = make_scene(6)
    with pytest.warns(UserWarning, match="version 1"):
        again = Gaussians2D.load(version_1(scene, tmp_path / "old.json"))
    with torch.no_grad():
        points = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) * 10 - 5
        weights = gaussian_weights(scene.means, conics(scene.scales, scene.rotations), points)
        before, after = (weights * x.opacities / eps for x, eps in ((scene, 0.03), (again, WEIGHT_EPS)))
    assert_close(before, after)  # only opacity / ε counts in an average
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(Gaussians2D.load(again.save(tmp_path / "new.json")).opacities, again.opacities)


@pytest.mark.parametrize("blend", ["additive", "over"])
def test_other_scenes_of_version_1_are_what_they_were(tmp_path, blend):
    scene = make_scene(6)
    scene.blend = Blend(blend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Gaussians2D.load(version_1(scene, tmp_path / "old.json"))
    assert all(torch.equal(*both) for both in zip(scene.parameters(), again.parameters()))


@pytest.mark.parametrize("change, message", [
    ({"thetas": [0.1]}, "'thetas' of shape"), ({"centers": [[0, 1], [1]]}, "'centers'"), ({"sigmas": [[1, math.nan], [1, 1]]}, "row 0"),
    ({"centers": [[0, 0], [math.inf, 0]]}, "row 1"), ({"N": 3}, "N is|shape"), ({"N": "two"}, "'N'"), ({"N": -1}, "'N'"), ({"N": None}, "N"),
    ({"alphas": None}, "alphas"), ({"sigmas": [[0, 1], [1, 1]]}, "scales"), ({"opacities": [0.5, 1.5], "colors": [[1, 1, 1]] * 2}, "opacities"),
    ({"blend": "multiply"}, "blend"), ({"format": "other"}, "format"), ({"version": 99}, "version"), ({"x_dim": [5, -5]}, "x_dim"), ({"res_x": 0}, "res_x"),
    ({"alphas": "red"}, "alphas"), ({"background": [1]}, "background")])
def test_broken_scene_files_are_refused_with_their_name(tmp_path, change, message):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({**FLAT, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        read_scene(path)
    assert str(path) in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\xff", "3"])
def test_files_that_are_no_scene(tmp_path, text):
    path = tmp_path / "no.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="expected a"):
        read_scene(path)


def test_saving_nan_is_refused_and_loses_nothing(tmp_path):
    scene, path = make_scene(2), tmp_path / "s.json"
    before = scene.save(path).read_bytes()
    with torch.no_grad():
        scene.colors[0, 0] = math.nan
    with pytest.raises(ValueError, match="colors: expected finite"):
        scene.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_atomic_write_leaves_no_half_file(tmp_path):
    path = atomic_write(tmp_path / "a", b"one")
    with pytest.raises(TypeError):
        atomic_write(path, "not bytes")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="existing folder"):
        atomic_write(tmp_path / "missing" / "a", b"")


def test_a_blend_is_no_argument_of_save(tmp_path):
    with pytest.raises(TypeError, match="blend"):
        make_scene(2).save(tmp_path / "s.json", blend="foo")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, message", [
    (dict(blend="foo"), "blend: expected one of 'weighted', 'additive', 'over', got 'foo'"), (dict(background=(0, 0)), "background: expected 3"),
    (dict(background=(0, 0, math.inf)), "background: expected"), (dict(height=0), "height"), (dict(width=2.5), "width"), (dict(width=True), "width"),
    (dict(scales=torch.zeros(2, 2)), "scales: expected positive"), (dict(opacities=torch.tensor([0.5, 1.5])), "opacities"),
    (dict(rotations=torch.zeros(3)), "rotations: expected shape"), (dict(means=torch.full((2, 2), math.nan)), "means: expected finite"),
    (dict(colors=torch.zeros(2)), "colors: expected shape"), (dict(x_dim=(1, 1)), "x_dim")])
def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path, change, message):
    path = make_scene(2).save(tmp_path / "s.json")
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError), match=f"{message}.*nothing was saved"):
        write_scene(dataclasses.replace(record_of(make_scene(2)), **change), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_look_spoiled_later_is_not_written(tmp_path):
    for name, value in (("blend", "foo"), ("background", (0, 0))):
        scene = make_scene(2)
        setattr(scene, name, value)
        with pytest.raises(ValueError, match=f"{name}: expected"):
            scene.save(tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


def test_numpy_integers_are_whole_numbers(tmp_path):
    record = read_scene(make_scene(2).save(tmp_path / "s.json", np.int64(4), np.int32(8)))
    assert (record.height, record.width) == (4, 8)


@pytest.mark.parametrize("name", ["s.obj", "s", "s.json.gz"])
def test_an_unknown_suffix_lists_the_known_ones(tmp_path, name):
    for use in (make_scene(2).save, Gaussians2D.load):
        with pytest.raises(ValueError, match=r"suffix \.json"):
            use(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_suffix_may_be_in_capitals_and_a_missing_file_is_said(tmp_path):
    assert len(Gaussians2D.load(make_scene(2).save(tmp_path / "S.JSON"))) == 2
    with pytest.raises(FileNotFoundError):
        read_scene(tmp_path / "nothing.json")


def test_the_names_of_the_blends_are_those_of_the_enum():
    assert BLENDS == tuple(blend.value for blend in Blend) and list(FORMATS) == [".json"]
