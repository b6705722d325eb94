"""The controller script, run by node against a mock of Lens Studio's runtime."""

from dataclasses import replace

import numpy as np
import pytest
from lens_runtime import (
    FRAME,
    START,
    controller,
    drag,
    entries,
    needs_node,
    poses_rendered,
    run_script,
    wait,
)
from lens_samples import ORBIT, SHIFT, WORLD, D, K, light_field, model_paths

from export.lens_studio import lens_scene_from, write_lens_project
from lightfield.camera import look_at
from lightfield.viewpoints import orbit_of

pytestmark = needs_node


def angles(pose, lens=ORBIT):
    """Azimuth and elevation of a rendered orbit pose."""
    outward = (pose[:, 3] - lens.orbit_center) / lens.orbit_radius
    return np.degrees([np.arctan2(outward[1], outward[0]), np.arcsin(outward[2])])


def orbit_pose(azimuth, elevation, lens=ORBIT):
    a, e = np.radians([azimuth, elevation])
    center = np.array(lens.orbit_center)
    outward = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    return look_at(center + lens.orbit_radius * outward, center, np.array(lens.orbit_up))


# ---- poses


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 10), (30, 40), (-135, 70), (400, 12.5)])
def test_an_orbit_pose_equals_look_at_from_the_same_position(azimuth, elevation):
    (pose,) = run_script(ORBIT, poses=[[azimuth, elevation]])["poses"]
    expected = orbit_pose(azimuth, elevation)
    assert np.allclose(np.reshape(pose["rotation"], (3, 3)), expected[:, :3], atol=1e-12)
    assert np.allclose(pose["position"], expected[:, 3], atol=1e-12)


def test_orbits_with_any_up_axis_equal_those_of_the_training_poses():
    """Any axis of a captured scene may point up; `lightfield.viewpoints` draws the training poses."""
    up, center = np.array([0.0, 1.0, 0.0]), np.array([0.5, 0.0, -0.5])
    poses = []
    for a in np.radians(np.arange(0, 360, 30)):
        outward = np.array([np.sin(a), 0.5 + 0.1 * np.sin(3 * a), np.cos(a)])
        poses.append(look_at(center + 3 * outward, center, up))
    poses = np.stack(poses).astype(np.float32)
    lens = lens_scene_from(light_field(WORLD), poses, "upright")
    places = [(0.0, 20.0), (75.0, 26.0), (-100.0, 30.0)]
    rendered = run_script(lens, poses=places)["poses"]
    orbit = orbit_of(poses)
    for place, pose in zip(places, rendered, strict=True):
        expected = orbit.pose(*place, lens.orbit_radius)
        assert np.allclose(np.reshape(pose["rotation"], (3, 3)), expected[:, :3], atol=1e-5)
        assert np.allclose(pose["position"], expected[:, 3], atol=1e-5)


def test_a_shifted_pose_moves_in_its_image_plane():
    mean = np.array(SHIFT.mean_pose)
    (pose,) = run_script(SHIFT, poses=[[0.25, -0.125]])["poses"]
    assert np.allclose(np.reshape(pose["rotation"], (3, 3)), mean[:, :3])
    assert np.allclose(pose["position"], mean[:, 3] + 0.25 * mean[:, 0] - 0.125 * mean[:, 1])


# ---- models


def test_models_are_built_with_callbacks_set_and_ray_models_on_the_cpu():
    log = run_script(ORBIT)["log"]
    builds = [(e["build"], e["mode"], e["placeholders"]) for e in log if "build" in e]
    assert builds == [("sampler", "CPU", 0), ("embedder", "CPU", 0), ("student", "Auto", 0)]


def test_one_image_runs_the_models_in_order_and_copies_unchanged():
    log = run_script(ORBIT, START)["log"]
    assert [e["run"] for e in log if "run" in e] == ["sampler", "embedder", "student"]
    sampler, embedder, student = (e for e in log if "run" in e)
    pose = np.float32([*sampler["c2w33"], *sampler["c2w13"]])
    assert np.allclose(pose, [*orbit_pose(30, 40)[:, :3].ravel(), *orbit_pose(30, 40)[:, 3]])
    points = pose[np.arange(6 * D) % 12] + np.arange(6 * D) / np.float32(64)
    assert np.array_equal(np.float32(embedder["rays"]), np.float32(points))
    encoded = np.tile(np.float32(points), K) * 2 + np.arange(6 * D * K) / np.float32(128)
    assert np.array_equal(np.float32(student["input"]), np.float32(encoded))
    (schedule,) = [e for e in log if "schedule" in e]
    assert schedule["recurring"] is False
    assert schedule["timing"] == ["LateUpdate", "LateUpdate"]


def test_nothing_runs_before_all_models_are_loaded():
    log = run_script(ORBIT, wait(0.5))["log"]
    assert not entries(log, "run")


def test_a_resting_camera_renders_once():
    log = run_script(ORBIT, START + wait(2))["log"]
    assert entries(log, "run") == ["sampler", "embedder", "student"]


def test_the_image_becomes_the_background_after_the_first_run():
    log = run_script(ORBIT, START + drag((0.5, 0.5), (0.6, 0.5)))["log"]
    assert entries(log, "target") == ["texture of output"]
    assert entries(log, "clear") == ["CustomTexture"]
    first_run = next(i for i, e in enumerate(log) if e.get("run") == "student")
    assert next(i for i, e in enumerate(log) if "target" in e) > first_run
    assert entries(log, "say") == ["Loading Tiny_bricks", ""]


@pytest.mark.parametrize(("image", "used"), [("whole", True), ("bare", False)])
def test_an_image_with_a_material_is_preferred(image, used):
    log = run_script(ORBIT, START, image=image)["log"]
    assert entries(log, "image") == (["texture of output"] if used else [])
    assert bool(entries(log, "target")) is not used


def test_touches_stay_in_the_lens():
    assert run_script(ORBIT)["touchBlocking"] is True


# ---- touches


def test_a_drag_turns_the_orbit_with_the_finger():
    log = run_script(ORBIT, START + drag((0.5, 0.5), (0.6, 0.55)))["log"]
    rendered = poses_rendered(log)
    assert len(rendered) == 9
    azimuth, elevation = angles(rendered[-1])
    assert azimuth == pytest.approx(30 - 180 * 0.1, abs=1e-3)
    assert elevation == pytest.approx(40 + 120 * 0.05, abs=1e-3)
    assert np.allclose(rendered[-1], orbit_pose(azimuth, elevation), atol=1e-5)


@pytest.mark.parametrize(("way", "limit"), [(1, 70), (-1, 10)])
def test_elevation_stops_at_its_limits(way, limit):
    log = run_script(ORBIT, START + drag((0.5, 0.5), (0.5, 0.5 + 0.45 * way)) + wait(2))["log"]
    elevations = [angles(pose)[1] for pose in poses_rendered(log)]
    assert elevations[-1] == pytest.approx(limit, abs=1e-3)
    assert min(elevations) > 10 - 1e-3
    assert max(elevations) < 70 + 1e-3


def test_a_full_circle_has_no_limit_and_a_partial_circle_has():
    turn = START + drag((0.1, 0.5), (0.9, 0.5)) * 3
    turned = np.unwrap([angles(p)[0] for p in poses_rendered(run_script(ORBIT, turn)["log"])], 180)
    assert turned[-1] < 30 - 400
    arc = replace(ORBIT, azimuth_range=(-10.0, 60.0))
    arc_azimuths = [angles(p)[0] for p in poses_rendered(run_script(arc, turn)["log"])]
    assert min(arc_azimuths) == pytest.approx(-10, abs=1e-3)


def test_after_a_flick_the_camera_glides_slows_down_and_rests():
    log = run_script(ORBIT, START + drag((0.5, 0.5), (0.6, 0.5)) + wait(4))["log"]
    azimuths = np.array([angles(pose)[0] for pose in poses_rendered(log)])
    glide = np.diff(azimuths[8:])
    assert len(glide) > 20
    assert (glide < 0).all()
    assert (np.diff(glide) > -1e-3).all()
    assert len(azimuths) < 9 + 3.5 / FRAME  # a resting camera is not rendered again


def test_a_finger_held_still_before_release_gives_no_glide():
    steps = drag((0.5, 0.5), (0.6, 0.5))
    held = run_script(ORBIT, START + steps[:-1] + wait(1) + steps[-1:] + wait(1))["log"]
    assert len(poses_rendered(held)) == 9


def test_a_new_touch_stops_the_glide():
    steps = START + drag((0.5, 0.5), (0.6, 0.5)) + wait(0.1)
    stopped = run_script(ORBIT, [*steps, ["down", 0.1, 0.1], *wait(1), ["up", 0.1, 0.1]])["log"]
    assert len(poses_rendered(stopped)) == len(poses_rendered(run_script(ORBIT, steps)["log"]))


def test_only_the_latest_finger_moves_the_camera():
    steps = [
        *START,
        ["down", 0.5, 0.5, 1],
        ["down", 0.2, 0.2, 2],
        ["drag", 0.9, 0.9, 1],
        ["update", FRAME],
        ["drag", 0.3, 0.2, 2],
        ["update", FRAME],
    ]
    rendered = poses_rendered(run_script(ORBIT, steps)["log"])
    assert len(rendered) == 2
    assert angles(rendered[-1]) == pytest.approx((30 - 18, 40), abs=1e-3)


def test_a_drag_between_two_frames_counts():
    steps = [*START, ["down", 0.5, 0.5], ["drag", 0.55, 0.5], ["up", 0.55, 0.5], ["update", FRAME]]
    rendered = poses_rendered(run_script(ORBIT, steps)["log"])
    assert angles(rendered[-1])[0] == pytest.approx(30 - 9, abs=1e-3)


def test_a_forward_facing_scene_moves_with_the_finger_inside_its_box():
    mean = np.array(SHIFT.mean_pose)

    def offsets(way):
        log = run_script(SHIFT, START + drag((0.5, 0.5), (0.5 + way, 0.5 + way)) + wait(3))["log"]
        rendered = poses_rendered(log)
        assert np.allclose([p[:, :3] for p in rendered], mean[:, :3])
        return np.array([(p[:, 3] - mean[:, 3]) @ mean[:, :2] for p in rendered])

    there, back = offsets(0.45), offsets(-0.45)
    assert np.allclose(there[0], 0, atol=1e-6)
    assert np.allclose(there[-1], (-0.5, 0.375), atol=1e-5)
    assert np.allclose(back[-1], (0.25, -0.125), atol=1e-5)


def test_drift_starts_after_a_rest_and_reverses_at_a_limit():
    moving = replace(ORBIT, drift=20.0, azimuth_range=(10.0, 40.0))
    assert len(poses_rendered(run_script(moving, START + wait(2.9))["log"])) == 1
    log = run_script(moving, START + wait(6))["log"]
    azimuths = [angles(p)[0] for p in poses_rendered(log)]
    assert azimuths[0] == pytest.approx(30)
    assert max(azimuths) == pytest.approx(40, abs=1e-3)
    assert min(azimuths) == pytest.approx(10, abs=1e-3)
    assert np.argmax(azimuths) < np.argmin(azimuths) < len(azimuths) - 10
    stopped = run_script(moving, START + wait(4) + [["down", 0.5, 0.5], *wait(1)])["log"]
    assert len(poses_rendered(stopped)) == len(
        poses_rendered(run_script(moving, START + wait(4))["log"])
    )


# ---- errors


def test_an_unset_input_is_shown_on_screen():
    log = run_script(ORBIT, START, missing=["embedder", "renderTarget"])["log"]
    (text,) = entries(log, "say")
    assert text == "Set these inputs of the NeuralLightField script: embedder, renderTarget"
    assert entries(log, "print") == [f"[NeuralLightField] {text}"]
    assert not entries(log, "build")


def test_without_a_message_object_the_error_is_printed():
    log = run_script(ORBIT, START, missing=["message", "student"])["log"]
    assert "student" in entries(log, "print")[0]
    assert not entries(log, "say")


def test_a_ray_model_that_cannot_load_gives_a_message():
    log = run_script(ORBIT, START + wait(1), models={"sampler": {"load": ["CPU"]}})["log"]
    text = "The sampler model could not be loaded (CPU): unsupported operator"
    assert entries(log, "say")[-1] == text
    assert not entries(log, "run")


@pytest.mark.parametrize("stage", ["load", "run"])
def test_a_student_falls_back_to_the_next_backend(stage):
    models = {"student": {stage: ["Auto", "GPU"]}}
    log = run_script(ORBIT, [*START, *START, *START], models=models)["log"]
    modes = [entry["mode"] for entry in log if entry.get("build") == "student"]
    assert modes == ["Auto", "GPU", "CPU"]
    assert entries(log, "target") == ["texture of output"]
    assert entries(log, "say")[-1] == ""
    assert "trying GPU" in entries(log, "print")[0]


@pytest.mark.parametrize(("stage", "doing"), [("load", "loaded"), ("run", "run")])
def test_a_student_that_no_backend_runs_gives_a_message(stage, doing):
    models = {"student": {stage: ["Auto", "GPU", "CPU"]}}
    log = run_script(ORBIT, [*START, *START, *START, *wait(1)], models=models)["log"]
    assert entries(log, "say")[-1].startswith(f"The student model could not be {doing} (CPU)")
    assert not entries(log, "target")


@pytest.mark.parametrize("role", ["sampler", "embedder"])
def test_a_ray_model_that_cannot_run_stops_the_script(role):
    log = run_script(ORBIT, START + wait(1), models={role: {"run": ["CPU"]}})["log"]
    assert entries(log, "say")[-1] == f"The {role} model could not be run (CPU): out of memory"
    assert not entries(log, "schedule")


def test_a_model_of_another_size_is_refused():
    models = {"embedder": {"sizes": {"rays": [6, 9, 1]}}}
    log = run_script(ORBIT, START, models=models)["log"]
    assert "embedder model's rays holds 54 numbers, not 36" in entries(log, "say")[-1]
    assert not entries(log, "run")


def test_the_script_of_a_project_is_the_tested_one(tmp_path):
    write_lens_project(tmp_path / "lens", ORBIT, *model_paths(tmp_path / "models"))
    text = (tmp_path / "lens/Assets/NeuralLightField.js").read_text()
    assert text == controller(ORBIT)
