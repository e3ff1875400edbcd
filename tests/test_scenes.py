"""Scene files: what is written can be read again, bit for bit, and what could not be is refused."""

import dataclasses
import json
import math
import tempfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_scene
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.testing import assert_close

from gs2d.gaussians import WEIGHT_EPS, PARAMETER_NAMES, Blend, Domain2D, Gaussians2D, conics, gaussian_weights
from gs2d.ground_truth import GroundTruth
from gs2d.io.files import atomic_write
from gs2d.io.scene_record import BLENDS, record_of
from gs2d.io.scenes import read_scene, write_scene
from gs2d.renderer import render
from gs2d.train import TrainConfig, train

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
    assert BLENDS == tuple(blend.value for blend in Blend)


# ── what `save` writes, `load` reads ──────────────────────────────────────────

def numbers(*shape, scale, special=()):
    "Float32 arrays with numbers of every size up to `scale`, and with those that are special."
    scale = float(np.float32(scale))
    size = st.floats(-scale, scale, width=32) | st.sampled_from([np.float32(v) for v in (0.0, -0.0, scale, -scale, *special)])
    return hnp.arrays(np.float32, shape, elements=size)


@st.composite
def anything(draw):
    "A scene, and what may be said about the picture that it was fitted to."
    n, channels = draw(st.integers(0, 4)), draw(st.integers(1, 8))
    parameters = dict(
        means=numbers(n, 2, scale=1e38), log_scales=numbers(n, 2, scale=87, special=(88, 88.7, -100, -700, -709, -740, -745, -800, 200, 709, 710)),
        rotations=numbers(n, scale=1e38, special=(7,)), opacity_logits=numbers(n, scale=200, special=(16, 17.5, 23, -103, -104, 1e38)),
        colors=numbers(n, channels, scale=1e38, special=(3.4028235e38, -1e-45)))
    raw = {name: torch.from_numpy(draw(values)) for name, values in parameters.items()}
    edge = st.floats(-1e308, 1e308)
    domain = draw(st.sampled_from([Domain2D(), Domain2D.for_image(3, 1000)]) | st.builds(
        lambda x, y: Domain2D(sorted(x), sorted(y)), *[st.tuples(edge, edge).filter(lambda v: v[0] != v[1] and abs(v[0] - v[1]) < 1e308)] * 2))
    background = draw(st.none() | st.tuples(*[st.floats(-3.4e38, 3.4e38)] * channels))
    size = st.none() | st.integers(-1, 10**6) | st.sampled_from([2**31 - 1, 2**31, 10**5000])
    scene = Gaussians2D(**raw, domain=domain, blend=draw(st.sampled_from(Blend)), background=background)
    return scene, draw(size), draw(size)


@pytest.mark.parametrize("suffix", [".json", ".safetensors", ".ply"])
@given(made=anything())
@settings(max_examples=200)
def test_what_save_writes_load_reads_and_the_rest_is_refused(suffix, made):
    scene, height, width = made
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"s{suffix}"
        try:
            scene.save(path, height, width)
        except ValueError as error:
            assert not list(Path(folder).iterdir()) and len(str(error)) < 300
            tiny = scene.log_scales.double().exp()
            refusable = suffix == ".ply" and (scene.colors.abs() > 9e37).any()
            refusable |= any(side is not None and not 1 <= side < 2**31 for side in (height, width)) or not tiny.isfinite().all()
            assert refusable or (tiny < 2.3e-308).any()
            return
        again, record = Gaussians2D.load(path), read_scene(path)
    assert (record.height, record.width) == (height, width)
    assert (again.domain, again.blend, again.background) == (scene.domain, scene.blend, scene.background)
    names = ("means", "scales", "rotations", "colors", "opacities") if suffix == ".json" else PARAMETER_NAMES
    for name in names:
        assert torch.equal(getattr(scene, name), getattr(again, name)), name
    assert_close(again.log_scales, scene.log_scales, rtol=0, atol=1e-15)  # a logarithm of 1e-17 is a scale of 1


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_a_fit_of_any_number_of_channels_is_saved_so_that_it_can_be_read(tmp_path, channels):
    truth = GroundTruth(torch.rand(16, 20, channels), None, Domain2D.for_image(16, 20))
    result = train(TrainConfig(5, n_iterations=2, device="cpu", init_level="content"), ground_truth=truth, progress=False)
    again = Gaussians2D.load(result.scene.save(tmp_path / "s.json"))
    assert again.colors.shape == (5, channels) and again.background == (0.0,) * channels


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_numbers_that_only_sixty_four_bits_can_hold_are_not_written(tmp_path, value):
    scene = make_scene(3).double()
    for name in ("means", "colors", "rotations"):
        spoiled = dataclasses.replace(record_of(scene), **{name: torch.full_like(getattr(scene, name), value)})
        with pytest.raises(ValueError, match=f"{name}: expected finite"):
            write_scene(spoiled, tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


# ── what strangers write ──────────────────────────────────────────────────────

TWO = {"opacities": [0.5, 0.5], "colors": [[1, 1, 1]] * 2}


def text_of(**change):
    return json.dumps({**FLAT, **change})


@pytest.mark.parametrize("text, words", [
    (text_of(colors={"a": 1}), "'colors'.*{'a': 1}"), (text_of(alphas={"a": 1}), "'alphas'"), (text_of(colors=[{}, {}]), "'colors'.*row 0"),
    (text_of(**TWO, x_dim={"a": 1, "b": 2}), "x_dim"), (text_of(x_dim=["a", -5, 5]), "x_dim"), (text_of(x_dim=[10**400, 1]), "x_dim"),
    (text_of(x_dim=[-1e308, 1e308]), "x_dim"), (text_of(x_dim=[True, 5]), "x_dim"), (text_of(x_dim=1), "x_dim"),
    (text_of(thetas=[0, 10**400]), "'thetas'.*row 1"), (text_of(sigmas=[[1, 1], [10**400, 1]]), "'sigmas'.*row 1"), (text_of(centers=[[0, 0], [0, -(10**400)]]), "'centers'.*row 1"),
    (text_of(**{**TWO, "colors": [[1, 1, 1], [1, 1e39, 1]]}), r"32 bits.*'colors'.*1e\+39.*row 1"), (text_of(alphas=[[1e39] * 3, [0] * 3]), "'alphas'.*row 0"),
    (text_of(centers=[[0, 0], [3.5e38, 0]]), "'centers'.*row 1"), (text_of(thetas=["0.1", 0]), "'thetas'.*'0.1' in row 0"),
    (text_of(thetas=[True, 0]), "'thetas'.*True in row 0"), (text_of(thetas=[None, 0]), "'thetas'.*row 0"), (text_of(thetas="ab"), "'thetas'.*'ab'"),
    (text_of(thetas=[[0.1], [0]]), "'thetas'.*row 0"), (text_of(centers=[[[0, 1]], [[1, 1]]]), "'centers'"), (text_of(background=None), "'background'"),
    (text_of(background={"r": 1}), "'background'"), (text_of(background=[1e39, 0, 0]), "'background'"), (text_of(N=10**9), "'centers'.*got 2 rows"),
    (text_of(N=10**400), "'N'"), (text_of(N=2.0), "'N'"), (text_of(N=True), "'N'"), (text_of(version=[]), "version"), (text_of(version={"a": 1}), "version"),
    (text_of(format=["gs2d-scene"]), "format"), (text_of(blend=[]), "blend"), (text_of(blend={"a": 1}), "blend"), (text_of(res_x=10**30), "res_x"),
    (text_of(N=0, alphas=[], centers=[], sigmas=[], thetas=[], background=[]), "channel"), (text_of(alphas=[[], []]), "channel"),
    (text_of(sigmas=[[1, 1], [1, 1e-310]]), "scales"), (text_of(alphas=[[1, 1, 1], [1, 1]]), "'alphas'.*row 1"), (text_of(opacities=7, colors=[[1]] * 2), "opacities"),
    ('{"N": 1, "N": 2}', "'N' comes twice"), ("[" * 100_000, "JSON"), ('{"x_dim": ' + "[" * 100_000 + "]" * 100_000 + "}", "JSON"), ("1" * 5000, "JSON"),
    ("NaN", "JSON object"), ("null", "JSON object"), ('"\\ud800"', "JSON object"), ('{"format": "\\ud800"}', "format"), ("{'N': 1}", "JSON")])
def test_a_wrong_file_is_one_line_with_its_name(tmp_path, text, words):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_scene(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "expected" in message and "\n" not in message and message.isprintable()
    assert len(message) <= 300 + len(str(path))


@pytest.mark.parametrize("value", ["x" * 10**6, ["x" * 10**6] * 3, [[0.5] * 10**5] * 3, {"k" * 10**6: 1}, {str(i): i for i in range(10**5)}, [[[[[[0]]]]]]])
@pytest.mark.parametrize("key", [*FLAT, "blend", "background", "opacities", "colors", "format", "version"])
def test_a_message_is_short_whatever_came(tmp_path, key, value):
    path = tmp_path / "s.json"
    path.write_text(text_of(**(TWO if key == "opacities" else {}) | {key: value}))
    if key == "dims":
        assert len(read_scene(path).means) == 2  # nobody asks
        return
    with pytest.raises(ValueError) as caught:
        read_scene(path)
    assert len(str(caught.value)) <= 300 + len(str(path)) and "\n" not in str(caught.value)


def test_a_number_of_rows_that_is_a_lie_costs_no_memory(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(text_of(N=10**9))
    tracemalloc.start()
    with pytest.raises(ValueError, match="got 2 rows"):
        read_scene(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_bytes_that_are_no_text_and_a_folder(tmp_path):
    (tmp_path / "s.json").write_bytes(b'{"format": "\xff\xfe"}')
    with pytest.raises(ValueError, match="as JSON"):
        read_scene(tmp_path / "s.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match="got a folder"):
        read_scene(tmp_path / "folder.json")


def test_a_typed_whole_number_may_be_large(tmp_path):
    (tmp_path / "s.json").write_text(text_of(centers=[[10**30, 0], [0, 0]]))
    assert Gaussians2D.load(tmp_path / "s.json").means[0, 0].item() == pytest.approx(1e30)
