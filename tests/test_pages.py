"""Pages for the browser: what is rounded, who lives when, what a recorder keeps, and what a hostile page gets. The drawing is in test_viewer_browser."""
import base64
import dataclasses
import io
import json
import re
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

import gs2d
from gs2d import Blend, DensifyConfig, Domain2D, ErrorGrowth, Gaussians2D, GroundTruth, TrainConfig, psnr, render
from gs2d.fit import default_portrait
from gs2d.gaussians import CUTOFF_POWER, MAX_ALPHA, WEIGHT_EPS
from gs2d.io.moments import Moment, Recording, decoded, encoded, fields_of, lives_of, raw_values, recording_of, size_of
from gs2d.io.pages import Page, from_html, page_bytes, to_html
from gs2d.io.pictures import load_picture
from gs2d.io.scene_record import record_of
from gs2d.show.viewer import Family, Recorder, replay, save_html
from gs2d.train import make_trainer, run


def some_scene(n=30, seed=0, channels=3, blend=Blend.WEIGHTED, **changes):
    rng = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=rng)

    values = dict(means=10 * uniform(n, 2) - 5, scales=0.1 + uniform(n, 2), rotations=20 * uniform(n) - 10,
                  opacities=uniform(n), colors=3 * uniform(n, channels) - 1)
    return Gaussians2D.from_values(**(values | changes), domain=Domain2D((-5, 5), (-3, 3)), blend=blend, background=(0.5,) * channels)


def header(data: bytes) -> dict:
    return json.loads(re.search(rb'<script type="application/json" id="gs2d-page">(.*?)</script>', data, re.DOTALL)[1])


def changed(page: bytes, **fields) -> bytes:
    "The page with another header."
    old = re.search(rb'id="gs2d-page">(.*?)</script>', page, re.DOTALL)[1]
    return page.replace(old, json.dumps(header(page) | fields).replace("<", "\\u003c").encode())


# ── rounding ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("blend", Blend)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_page_holds_the_scene_it_was_made_of(blend, channels, tmp_path):
    scene = some_scene(blend=blend, channels=channels)
    found = gs2d.load(scene.save(tmp_path / "scene.html", 48, 80))
    assert (len(found), found.domain, found.blend, found.background) == (len(scene), scene.domain, scene.blend, scene.background)
    with torch.no_grad():
        assert psnr(render(found, 48, 80), render(scene, 48, 80)) > 40


def test_a_fitted_scene_loses_at_most_two_tenths_of_a_decibel(tmp_path):
    picture = load_picture(default_portrait(), max_side=256)
    result = gs2d.fit_image(picture, n_gaussians=1500, steps=300, progress=False)
    page = result.show()
    scene = Gaussians2D.from_record(from_html(page.data))
    with torch.no_grad():
        lost = result.psnr - psnr(render(scene, *picture.shape[:2]), picture).item()
    assert result.psnr > 28 and lost <= 0.2
    assert all(field["bits"] <= 16 for field in header(page.data)["fields"])
    assert (header(page.data)["height"], header(page.data)["width"]) == picture.shape[:2]
    assert save_html(result, tmp_path / "result.html").read_bytes() == page.data


@given(st.integers(0, 12), st.integers(0, 2**32), st.sampled_from([1.0, 1e-6, 1e6]), st.floats(-30, 30))
@settings(max_examples=60, deadline=None)
def test_no_number_is_off_by_more_than_half_a_step(n, seed, far, logit):
    scene = some_scene(n, seed)
    with torch.no_grad():
        scene.means.mul_(far)
        scene.opacity_logits.fill_(logit)
    recording = recording_of(record_of(scene))
    told, fields = recording.moments[0].values, fields_of(recording.moments)
    k, stream = encoded(recording, fields)
    assert k == n and len(stream) == size_of(n, [n], fields)
    found = decoded(stream, [n], n, fields)
    for field in fields:
        span = np.array(field["high"]) - field["low"]
        step = span / (2 ** field["bits"] - 1) if field["bits"] < 32 else 2**-22 * np.abs(told[field["name"]]).max(initial=0)
        assert (np.abs(found[field["name"]] - told[field["name"]]) <= 0.5001 * step + 1e-12).all()


def test_a_position_out_of_reach_of_sixteen_bits_is_kept_as_float32():
    scene = some_scene()
    scene.means.data[0] = 1e20
    found = from_html(to_html(record_of(scene)))
    assert_close(found.means.float(), scene.means.detach(), rtol=1e-6, atol=1e-12)


def test_opacities_of_nothing_and_of_everything_stay_what_they_are():
    scene = some_scene(3, opacities=torch.tensor([0.0, 0.5, 1.0]))
    assert_close(from_html(to_html(record_of(scene))).opacities, torch.tensor([0, 0.5, 1.0]).double(), rtol=0, atol=0.02)


def test_the_constants_of_the_page_are_those_of_the_renderer():
    for blend in Blend:
        said = header(to_html(record_of(some_scene(blend=blend))))["constants"]
        assert said == dict(cutoff_power=CUTOFF_POWER, floor=blend.floor, eps=WEIGHT_EPS, max_alpha=MAX_ALPHA)


def test_two_channels_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match="expected colours of 1, 3 or 4 channels for a page, got 2"):
        some_scene(channels=2).show()


def test_a_title_is_text():
    data = page_bytes(recording_of(record_of(some_scene()), title="</script><script>alert('x')</script>"))
    assert data.count(b"</script>") == to_html(record_of(some_scene())).count(b"</script>")
    assert header(data)["title"] == "</script><script>alert('x')</script>"


def test_a_page_shows_itself_in_a_frame_that_may_do_nothing_but_draw():
    shown = some_scene().show(height=300)._repr_html_()
    assert re.search(r'<iframe title="[^"]+" width="100%" height="300"', shown) and 'sandbox="allow-scripts"' in shown
    assert len(re.findall("</?iframe", shown)) == 2 and "<script" not in shown
    still = re.search(r'<img alt="([^"]+)" src="data:image/jpeg;base64,([^"]+)"', shown)  # where frames are not shown
    assert still[1] == "A scene of Gaussians to look around in, as a still picture"
    assert Image.open(io.BytesIO(base64.b64decode(still[2]))).size == (144, 86)


def test_every_page_weighs_at_most_100_kilobytes_before_its_data():
    data = to_html(record_of(some_scene(2)))
    assert len(data) - len(header(data)["data"]) <= 100_000


def test_small_targets_are_exact_and_large_ones_small():
    small, large = torch.rand(20, 30, 3), torch.rand(400, 400, 3)
    assert header(some_scene().show(small).data)["target"].startswith("data:image/png")
    assert header(some_scene().show(large).data)["target"].startswith("data:image/jpeg")
    assert header(some_scene().show().data)["target"] is None


# ── who lives when ────────────────────────────────────────────────────────────


def rows_of_a_round(rng, n: int) -> np.ndarray:
    "The source of each row after a round: some pruned, some doubled, some from nowhere, in the order that growth leaves."
    kept = np.flatnonzero(rng.random(n) < 0.8)
    doubled = kept[rng.random(len(kept)) < 0.3]
    return np.concatenate([kept, doubled, np.full(rng.integers(0, 4), -1)]).astype(np.int64)


@given(st.integers(1, 15), st.integers(1, 12), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_identities_survive_growth_and_moments_give_back_their_rows(n, n_rounds, sorted_rows, seed):
    rng = np.random.default_rng(seed)
    family, moments = Family(n, ordered=sorted_rows), []

    def keep():
        n = len(family.ids)
        values = raw_values(record_of(some_scene(n, int(rng.integers(2**31)))))
        order = np.arange(n) if sorted_rows else np.argsort(family.ids)
        moments.append(Moment(family.ids[order], {name: value[order] for name, value in values.items()}, {}))

    keep()
    for _ in range(n_rounds):
        source = rows_of_a_round(rng, len(family.ids))
        source = np.sort(source) if sorted_rows else source
        before = family.ids
        family.follow(source)
        assert len(set(family.ids.tolist())) == len(source)
        for row, k in enumerate(family.ids.tolist()):  # it is who it was, or a child of who it was, or new
            parent = before[source[row]] if source[row] >= 0 else None
            assert k == parent or family.parents.get(k) == parent
        assert set(before[source[source >= 0]]) <= set(family.ids.tolist())  # who has a row lives on
        place = {k: i for i, k in enumerate(family.order)}
        order = [place[k] for k in (family.ids if sorted_rows else np.sort(family.ids)).tolist()]
        assert order == sorted(order)
        if rng.random() < 0.6:
            keep()
    keep()
    still = recording_of(record_of(some_scene(1)))
    recording = dataclasses.replace(still, moments=moments, order=np.array(family.order), parents=family.parents)
    lives = lives_of(recording)
    for k, parent in enumerate(lives.parents.tolist()):
        assert parent < 0 or lives.births[parent] <= lives.births[k] - 1 < lives.deaths[parent]
    fields, counts = fields_of(moments), [len(moment.ids) for moment in moments]
    k, stream = encoded(recording, fields)
    found = decoded(stream, counts, k, fields)
    for field in fields:
        step = (np.array(field["high"]) - field["low"]) / (2 ** field["bits"] - 1)
        assert (np.abs(found[field["name"]] - moments[-1].values[field["name"]]) <= 0.5001 * step + 1e-12).all()


def test_a_parent_that_was_gone_before_is_none():
    values = raw_values(record_of(some_scene(1)))
    still = recording_of(record_of(some_scene(1)))
    moments = [Moment(np.array([k]), values, {}) for k in range(3)]
    lives = lives_of(dataclasses.replace(still, moments=moments, order=np.arange(3), parents={1: 0, 2: 0}))
    assert lives.parents.tolist() == [-1, 0, -1] and lives.births.tolist() == [0, 1, 2] and lives.deaths.tolist() == [1, 2, 3]


def test_where_the_order_is_depth_rows_in_another_order_are_taken_for_others():
    family = Family(3, ordered=True)
    family.follow(np.array([2, 0, 1]))
    assert family.ids[0] == 2 and family.parents == {int(family.ids[1]): 0, int(family.ids[2]): 1}


# ── a recorder ────────────────────────────────────────────────────────────────

TRUTH = GroundTruth.random(20, 32, 40, seed=3)
PLAIN = TrainConfig(n_gaussians=20, n_iterations=80, device="cpu")
GROWING = [
    DensifyConfig(every_n_steps=10, grad_threshold=1e-7, max_gaussians=60), ErrorGrowth(rounds=4, max_gaussians=60, start_share=0.5)]


@pytest.mark.parametrize("densify", [None, *GROWING], ids=["none", "gradient", "error"])
@pytest.mark.parametrize("blend", [Blend.WEIGHTED, Blend.OVER])
def test_a_recorder_tells_the_run_and_changes_nothing(densify, blend):
    config = dataclasses.replace(PLAIN, densify=densify, blend=blend)
    recorder, alone = Recorder(moments=20), run(make_trainer(config, ground_truth=TRUTH), progress=False)
    result = run(make_trainer(config, ground_truth=TRUTH), recorder, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(alone.scene.parameters(), result.scene.parameters()))
    moments = recorder.recording().moments
    steps = [moment.about["step"] for moment in moments]
    assert steps[0] == 0 and steps[-1] == 80 and steps == sorted(set(steps)) and 15 <= len(steps) <= 21
    assert steps[1] - steps[0] < steps[-1] - steps[-2]
    assert densify is None or len(moments[0].ids) < len(moments[-1].ids)
    if densify is None:  # angles as they are: on its way from one moment to the next none takes a turn
        assert_close(moments[-1].values["rotations"][:, 0], result.scene.rotations.detach().double().numpy(), rtol=0, atol=0)
    assert abs(moments[-1].about["psnr"] - result.psnr) < 1e-4
    if densify is not None and type(densify) is DensifyConfig:
        assert recorder.recording().parents
    found = Gaussians2D.from_record(from_html(recorder.show().data))
    assert found.blend == result.scene.blend and len(found) == len(result.scene)
    with torch.no_grad():
        assert psnr(render(found, 32, 40), result.image) > 35


@pytest.mark.parametrize("densify", GROWING, ids=["gradient", "error"])
def test_who_goes_on_as_the_same_moves_only_as_far_as_a_step_moves(densify):
    "Identities over a round: a Gaussian that keeps its own moves as Adam does, never as a stranger in its row would."
    trainer = make_trainer(dataclasses.replace(PLAIN, densify=densify, lr=1e-3), ground_truth=TRUTH)
    recorder, seen = Recorder(moments=81), {}
    for _ in recorder(trainer, iter(trainer)):
        now = dict(zip(recorder._family.ids.tolist(), trainer.scene.colors.detach().clone()))
        for k in now.keys() & seen.keys():
            assert (now[k] - seen[k]).abs().max() < 0.02
        seen = now


def test_two_thousand_gaussians_in_sixty_moments_take_at_most_a_megabyte():
    truth = GroundTruth.random(400, 64, 64, seed=1)
    trainer, recorder = make_trainer(TrainConfig(n_gaussians=2000, n_iterations=120, device="cpu"), ground_truth=truth), Recorder()
    run(trainer, recorder, progress=False)
    assert len(recorder) >= 50 and len(recorder.show().data) <= 1_000_000


def test_a_run_that_is_stopped_is_told_up_to_there_and_goes_on():
    trainer, recorder = make_trainer(PLAIN, ground_truth=TRUTH), Recorder(moments=20)
    for record in (records := recorder(trainer, iter(trainer))):
        if record.step == 29:
            break
    records.close()
    assert recorder.recording().moments[-1].about["step"] == 30
    run(trainer, recorder, progress=False)
    trainer.update(n_iterations=300)
    run(trainer, recorder, progress=False)
    steps = [moment.about["step"] for moment in recorder.recording().moments]
    assert steps[0] == 0 and 30 in steps and steps[-1] == 300 and len(steps) <= 41


def test_steps_taken_behind_its_back_break_no_training():
    config = dataclasses.replace(PLAIN, densify=GROWING[1])
    trainer, recorder = make_trainer(config, ground_truth=TRUTH), Recorder(moments=20)
    recorder.look(trainer)
    for _ in range(40):
        trainer.step()
    run(trainer, recorder, progress=False)
    assert len(from_html(recorder.show().data).means) == len(trainer.scene)


def test_a_recorder_that_has_seen_nothing_says_so():
    recorder = Recorder()
    assert repr(recorder) == "Recorder(0 moments)" and recorder._repr_html_() is None
    with pytest.raises(ValueError, match="expected a recorder that has seen a training run"):
        recorder.show()


def test_replay_writes_the_page_when_the_run_ends_also_by_an_error(tmp_path):
    path = tmp_path / "replay.html"
    run(make_trainer(PLAIN, ground_truth=TRUTH), replay(path, moments=10, title="blobs"), progress=False)
    assert header(path.read_bytes())["title"] == "blobs" and header(path.read_bytes())["moments"][-1]["step"] == 80
    path.unlink()

    def fails(trainer, records):
        for record in records:
            if record.step == 19:
                raise RuntimeError("no more")
            yield record

    with pytest.raises(RuntimeError, match="no more"):
        run(make_trainer(PLAIN, ground_truth=TRUTH), replay(path), fails, progress=False)
    assert header(path.read_bytes())["moments"][-1]["step"] == 20


@pytest.mark.parametrize("call, message", [
    (lambda: replay("x.webm"), "expected a path that ends in .html, got '.webm'"),
    (lambda: save_html(some_scene(), "x.txt"), "expected a path that ends in .html, got '.txt'"),
    (lambda: save_html(3, "x.html"), "expected a scene, a TrainResult or a Recorder, got int"),
    (lambda: save_html(Image.new("L", (2, 2)), "x.html"), "expected a scene, a TrainResult or a Recorder, got Image"),
    (lambda: Recorder(1), "moments: expected a whole number of at least 2, got 1"),
])
def test_wrong_calls_are_told(call, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


# ── hostile pages ─────────────────────────────────────────────────────────────

PAGE = to_html(record_of(some_scene(8)))
SAID = header(PAGE)
BOMB = base64.b64encode(zlib.compress(bytes(50_000_000), 9)).decode()


@pytest.mark.parametrize("data, message", [
    (b"", "expected a page that gs2d wrote"), (b"<html>", "expected a page that gs2d wrote"), (PAGE[:PAGE.index(b"gs2d-page") + 300], "expected"),
    (changed(PAGE, version=2), "version 1"), (changed(PAGE, format="else"), "'gs2d-page'"), (changed(PAGE, n=10**9), "1,000,000,000"),
    (changed(PAGE, n="8"), "expected a whole number"), (changed(PAGE, n=9), "expected"), (changed(PAGE, channels=2), "channels"),
    (changed(PAGE, channels=[3]), "channels"), (changed(PAGE, moments=[]), "at least one moment"), (changed(PAGE, moments=3), "'moments'"),
    (changed(PAGE, moments=[{"n": 10**9}], n=10**9), "1,000,000,000"), (changed(PAGE, moments=[{"n": -1}]), "n of a moment"),
    (changed(PAGE, moments=[{"n": 8}] * 100_000), "expected"), (changed(PAGE, data=BOMB), "bytes of data"), (changed(PAGE, data="%"), "base64"),
    (changed(PAGE, data=SAID["data"][:40]), "expected"), (changed(PAGE, data=7), "'data'"), (changed(PAGE, fields=[]), "the fields"),
    (changed(PAGE, fields=SAID["fields"][:4] + [SAID["fields"][4] | {"bits": 99}]), "bits"),
    (changed(PAGE, fields=[SAID["fields"][0] | {"low": [0]}] + SAID["fields"][1:]), "'low'"),
    (changed(PAGE, fields=[SAID["fields"][0] | {"high": [1e999, 1]}] + SAID["fields"][1:]), "'high'"),
    (changed(PAGE, x_dim=[1, -1]), "x_dim"), (changed(PAGE, blend="mean"), "blend"), (changed(PAGE, background=[0]), "background"),
    (changed(PAGE, height=-4), "height"), (changed(PAGE, width=[1]), "width"),
])
def test_a_hostile_page_gets_one_line(data, message, tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        gs2d.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_page_is_a_scene_or_one_line(data):
    raw, at = bytearray(PAGE), data.draw(st.integers(PAGE.index(b"gs2d-page"), len(PAGE) - 1))
    raw[at:at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        from_html(bytes(raw))
    except ValueError as error:
        assert "\n" not in str(error)
