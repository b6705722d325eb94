from __future__ import annotations

import io
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image
from report_samples import HOST, sample_bench, sample_run, sample_scene, sample_trials

from device.comparison import Comparison
from lightfield.errors import CheckpointError
from lightfield.files import read_json, sha256_of, write_json
from lightfield.latency import RatioInterval
from lightfield.run import MANIFEST, Run, StageWriter
from lightfield.scenes.scene import Scene, save_scene
from lightfield.student import mobile_r2l_spec
from pipeline.artifacts import GRAPHS, LATENCIES, RENDERS
from pipeline.console import Console
from pipeline.report import page_images, quantities
from pipeline.report.bench_page import bench_page, comparison_page
from pipeline.report.charts import training_chart
from pipeline.report.pages import ENVIRONMENT, page
from pipeline.report.provenance import commands
from pipeline.report.run_data import STAGES, RunData
from pipeline.report.svg import PAINTS, TEACHER
from pipeline.stages.report import make_report
from prune.measurement import Trial, pareto_front
from prune.state import HISTORY

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp; $x_{$"
VOID = {"img", "meta"}


class Page(HTMLParser):
    """A parsed page: elements nest, ids are unique, and nothing is fetched or executed."""

    def __init__(self, text: str):
        super().__init__()
        self.source, self.open, self.tags, self.ids = text, list[str](), list[str](), list[str]()
        self.images, self.links, self.words = (
            list[dict[str, str | None]](),
            list[str](),
            list[str](),
        )
        self.feed(text)
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            self.images.append(attributes)
        for name in ("src", "href", "xlink:href"):
            if (target := attributes.get(name)) is not None:
                assert target.startswith(("data:image/webp;base64,", "#")), target
                self.links.append(target)
        if (identifier := attributes.get("id")) is not None:
            self.ids.append(identifier)
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):  # pyright: ignore
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def scene() -> Scene:
    return sample_scene()


@pytest.fixture(scope="module")
def whole_run(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return sample_run(tmp_path_factory.mktemp("runs") / "bricks", scene)


@pytest.fixture(scope="module")
def whole_page(whole_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Page:
    copy = tmp_path_factory.mktemp("reported") / "bricks"
    shutil.copytree(whole_run.path, copy)
    return report_of(Run(copy))


@pytest.fixture
def run(whole_run: Run, tmp_path: Path) -> Run:
    shutil.copytree(whole_run.path, tmp_path / "bricks")
    return Run(tmp_path / "bricks")


def report_of(run: Run) -> Page:
    return Page((make_report(run, Console()).path / "index.html").read_text(encoding="utf-8"))


def record(run: Run, stage: str, name: str) -> None:
    """Write the present hash and size of a file into its manifest."""
    path = run.path / stage / name
    entry = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
    edit(run, stage, MANIFEST, lambda m: m["files"].update({name: entry}))


def edit(run: Run, stage: str, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of an artifact, with its hash and size in the manifest."""
    path = run.path / stage / name
    data = read_json(path, CheckpointError)
    changed = change(data)
    write_json(path, data if changed is None else changed)
    if name != MANIFEST:
        record(run, stage, name)


def test_whole_page_shows_every_stage_and_its_figures(whole_page: Page) -> None:
    page = whole_page
    for section in ("images", "quality", "pruning", "latency", "files", "making"):
        assert section in page.ids
    for figure in (
        "27.71 dB", "27.02 dB", "26.58 dB",  # manifests
        "28.01 dB",  # one ray per pixel
        "4.20 ms", "2.04 ms", "2.10 ms", "0.485", "0.473 to 0.499",  # the search
        "142.30 dB", "3.6e-07", "252 kB", "0123456789ab", "0.00 dB", "0.71 dB", "unfit",  # the graphs
        "Sample CPU", "no data set was given", "lens/Bricks/Bricks.esproj",
    ):  # fmt: skip
        assert figure in page.text, figure
    assert "script" not in page.tags
    assert page.tags.count("svg") == 7
    assert len(page.source) < 3_000_000
    assert "nan" not in page.text.lower().replace("nano", "")
    assert "None" not in page.text


def test_first_lines_name_data_and_device(whole_page: Page) -> None:
    text = whole_page.text
    top = text[: text.index("Quality on test views")]
    assert "no data set was given" in top
    assert "measured on the host CPU, not on a phone: Sample CPU" in top


def test_page_is_the_same_every_time_and_holds_no_path_of_this_machine(
    run: Run, whole_page: Page
) -> None:
    assert report_of(run).source == whole_page.source
    assert str(run.path.parent) not in whole_page.source


def test_an_unchanged_run_is_not_reported_again_and_a_changed_figure_is(run: Run) -> None:
    first = make_report(run, Console())
    assert make_report(run, Console()).manifest == first.manifest
    edit(run, "teacher", MANIFEST, lambda m: m["metrics"].update(psnr_db=31.25))
    assert "31.25 dB" in report_of(run).text


@pytest.mark.parametrize("until", ["scene", "teacher", "student", "export"])
def test_an_unfinished_run_lists_the_missing_stages(
    until: str, whole_run: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "half")
    finished = STAGES[: STAGES.index(until) + 1]
    for stage in finished:
        shutil.copytree(whole_run.path / stage, run.path / stage)
    page = report_of(run)
    for stage in STAGES[len(finished) :]:
        assert f"nelf {stage} has not been run" in page.text
    assert run.artifact("report").metrics["missing"] == sorted(STAGES[len(finished) :])
    assert set(run.artifact("report").manifest["inputs"]) == set(finished)


def test_without_a_scene_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nelf scene"):
        make_report(Run(tmp_path / "empty"), Console())


def test_text_from_files_is_never_markup(scene: Scene, tmp_path: Path, unchecked: None) -> None:
    names = tuple(f"{ATTACK}{i}" for i in range(len(scene.test)))
    hostile = replace(
        scene,
        name=ATTACK,
        source=ATTACK,
        provenance={"credit": ATTACK, ATTACK: ATTACK},
        test=replace(scene.test, names=names),
    )
    device = replace(HOST, name=ATTACK, system=ATTACK, runtime=ATTACK, provider=ATTACK)
    run = sample_run(tmp_path / "a $(id) 'b' <i>", hostile, device=device, source=[[ATTACK, 3, 4]])

    def rename(trials: list[dict[str, Any]]) -> None:
        for trial in trials[1:]:
            trial.update(kind=ATTACK, clock=ATTACK)
        trials[2]["verdict"] = ATTACK

    edit(run, "prune", HISTORY, lambda s: rename(s["trials"]))
    edit(run, "prune", HISTORY, lambda s: s.update(stopped=ATTACK))
    edit(run, "export", GRAPHS, lambda g: [dict.fromkeys(g[0], ATTACK) | {"size_bytes": 1}, *g])
    edit(run, "bench", LATENCIES, lambda r: r["devices"][0]["graphs"][1].update(name=ATTACK))
    edit(run, "lens", MANIFEST, lambda m: m["details"].update(project=ATTACK))
    edit(run, "teacher", MANIFEST, lambda m: m.update(machine=ATTACK, git_commit={ATTACK: ATTACK}))

    page = report_of(run)  # fails on event handlers and external addresses
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>") > 30
    assert f"1 {ATTACK} {ATTACK} 3.10 ms" in page.text  # verdict and kind of a trial
    assert all(image["src"] != "x" for image in page.images)
    first = commands(RunData.read(run))[0]
    assert shlex.split(first)[3] == "runs/a $(id) 'b' <i>"
    assert shlex.split(first)[-1] == ATTACK


def test_incompatible_files_are_shown_as_not_available(run: Run, unchecked: None) -> None:
    for stage in STAGES[1:]:
        edit(
            run, stage, MANIFEST, lambda m: m.update(metrics={"parameters": "a lot", "ssim": None})
        )
    edit(run, "prune", HISTORY, lambda s: {"trials": [{"verdict": 7}, "x", {"latency_ms": []}]})
    edit(run, "export", GRAPHS, lambda g: [{"size_bytes": 5, "ops": ["Conv"]}, 3])
    edit(run, "bench", LATENCIES, lambda r: r["devices"][0]["graphs"][0].update(latency={"x": 1}))
    edit(run, "student", MANIFEST, lambda m: m["details"].update(spec={"points": "many"}))
    edit(run, "prune", MANIFEST, lambda m: m["details"].update(device={"name": 3}))
    text = report_of(run).text
    assert "a lot" not in text
    assert "not a latency record" in text
    assert "not a student specification" in text
    assert "the record of the search is incompatible" in text


def test_damaged_files_are_named(run: Run) -> None:
    (run.path / "teacher" / RENDERS).write_bytes(b"cut")
    (run.path / "export" / MANIFEST).write_text("{")
    np.save(run.path / "student" / RENDERS, np.zeros((1, 2, 2, 3), np.uint8))
    record(run, "student", RENDERS)
    changed = run.path / "prune" / RENDERS
    changed.write_bytes(b"PK\x03\x04" + changed.read_bytes()[4:])
    text = report_of(run).text
    assert "Teacher not available: the file is missing or truncated" in text
    assert "Student not available: holds uint8 values of shape (1, 2, 2, 3), not uint8 of" in text
    changed = "the file's SHA-256 differs from the one in the manifest"
    assert f"Pruned student not available: {changed}" in text
    assert "the export artifact is damaged" in text


def test_a_changed_byte_in_a_listed_file_is_reported(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = run.path / "export" / "Sample.onnx"
    graph.write_bytes(b"graph")
    record(run, "export", graph.name)
    make_report(run, Console())
    graph.write_bytes(b"grapi")
    text = report_of(run).text
    assert (
        "Damaged: export/Sample.onnx: the file's SHA-256 differs from the one in the manifest"
        in text
    )
    assert "report: the export stage is damaged (Sample.onnx: " in capsys.readouterr().out
    graph.write_bytes(b"graph")
    assert "Damaged" not in report_of(run).text


def test_emulated_times_are_never_shown(scene: Scene, tmp_path: Path) -> None:
    run = sample_run(tmp_path / "run", scene, device=replace(HOST, kind="phone", emulated=True))
    page = report_of(run)
    assert "emulated device" in page.text[: page.text.index("Images Each row")]
    assert not re.search(r"\d ms|\bFPS\b", page.text)
    assert page.tags.count("svg") == 3  # two training curves and the network


def test_a_phone_is_named_as_one(scene: Scene, tmp_path: Path) -> None:
    run = sample_run(tmp_path / "run", scene, device=replace(HOST, kind="phone", name="Phone 9"))
    text = report_of(run).text
    assert "measured on a phone, Phone 9" in text
    assert "a host's figures" not in text
    assert "host CPU" not in text


def test_a_graph_without_latency_shows_the_reason_and_throttling_a_warning(
    whole_page: Page,
) -> None:
    text = whole_page.text
    assert "Pruned student, int8: speed not available: its images are 11.2 dB from" in text
    assert "Pruned student: throttled" not in text  # only the sustained measurement throttled
    assert "Pruned student, sustained: throttled: the thermal status rose to 1" in text
    assert "Pruned student, fp16: 1 node ran on another provider" in text


def test_devices_that_were_not_measured_are_named(run: Run) -> None:
    edit(run, "bench", LATENCIES, lambda r: r.update(failed=["P2: the phone is offline"]))
    text = report_of(run).text
    assert "Not measured: P2: the phone is offline" in text
    edit(run, "bench", LATENCIES, lambda r: r.update(devices=r["devices"] * 2))
    assert report_of(run).text.count("1000 ms divided by the median") == 2


def test_the_benchmark_page_shows_every_device(scene: Scene) -> None:
    phone = replace(HOST, kind="phone", name="Phone 9", unit="ab12")
    page = bench_page("toy", [sample_bench(HOST), sample_bench(phone)], ["P3: lost"])
    assert page == bench_page("toy", [sample_bench(HOST), sample_bench(phone)], ["P3: lost"])
    assert "Phone 9, unit ab12" in page
    assert "Not measured: P3: lost" in page
    assert page.count("<svg") == 4
    emulated = replace(phone, emulated=True)
    assert not re.search(r"\d ms|\bFPS\b", bench_page("toy", [sample_bench(emulated)], []))


def test_the_comparison_page_states_ratio_interval_and_verdict() -> None:
    graphs = {
        graph.precision: graph.latency for graph in sample_bench(HOST).graphs if graph.latency
    }
    interval = RatioInterval(0.743, 0.731, 0.752, 0.95, 100)
    found = Comparison(graphs["fp16"], graphs["fp32"], interval)
    page = Page(comparison_page(("half", "whole"), found)).text
    assert "half takes 0.743 of the time of whole (interval 0.731 to 0.752" in page
    assert "95% confidence): faster" in page
    emulated = replace(graphs["fp16"], device=replace(HOST, emulated=True))
    hidden = comparison_page(("half", "whole"), replace(found, candidate=emulated))
    assert "0.743" not in hidden


def test_two_devices_are_both_named(run: Run) -> None:
    phone = asdict(replace(HOST, kind="phone", name="Phone 9"))
    edit(run, "bench", MANIFEST, lambda m: m["details"].update(device=phone))
    text = report_of(run).text
    assert "Latency: measured on the host CPU, not on a phone: Sample CPU" in text
    assert "The benchmark below: measured on a phone, Phone 9" in text


def test_a_latency_in_cpu_time_is_labeled(run: Run) -> None:
    edit(run, "prune", HISTORY, lambda s: s["trials"][-1].update(clock="cpu"))
    text = report_of(run).text
    assert "2.04 ms of CPU time per image" in text
    assert "too busy for undisturbed runs" in text


def test_outdated_stages_are_marked(run: Run) -> None:
    other = mobile_r2l_spec((2, 2, 2), stream_width=16, blocks=2)

    def make(stage: StageWriter) -> None:
        stage.details["spec"] = other.to_json()

    run.perform("student", {"seed": 1}, {"scene": run.artifact("scene")}, make)
    chain = RunData.read(run)
    assert chain.outdated("prune") == ["student"]
    assert chain.outdated("bench") == ["student"]
    assert not chain.outdated("export")  # made from the pruned student, which is unchanged
    text = report_of(run).text
    assert "Outdated: made before the present student" in text
    assert "the pruned network is not part of the present student" in text
    assert "made from an older student and is not comparable" in text


def test_the_size_of_an_outdated_export_is_not_shown(run: Run) -> None:
    dense = {"scene": run.artifact("scene"), "student": run.artifact("student")}

    def export(stage: StageWriter) -> None:
        write_json(stage.path / GRAPHS, [{"purpose": "for ONNX Runtime", "size_bytes": 777_000}])
        stage.details["student"] = "student"

    run.perform("export", {}, dense, export)
    text = report_of(run).text
    assert "exported before the present student" in text
    assert "Pruned student 2.00 ms" not in text  # the benchmark measured the dense student


def test_real_data_is_credited(scene: Scene, tmp_path: Path) -> None:
    real = replace(scene, name="lego", source="blender", provenance={"credit": "A. Builder, CC"})
    run = sample_run(tmp_path / "lego", real, source=[["train/r_0.png", 1_000_000, 1]] * 3)
    text = report_of(run).text
    assert "“lego” in Blender (NeRF-synthetic) format" in text
    assert "Credit: A. Builder, CC." in text
    assert "no data set was given" not in text
    assert "3 files, 3 MB" in text
    assert "one ray per pixel" not in text
    assert "--data FOLDER_OF_THE_IMAGES" in text


def test_shown_psnr_is_that_of_the_renders(whole_run: Run, whole_page: Page, scene: Scene) -> None:
    text = whole_page.text
    renders = np.load(whole_run.path / "prune" / RENDERS)
    for image, truth in zip(renders, scene.test.images, strict=True):
        mse = ((image / 255 - truth / 255) ** 2).mean()
        assert f"Pruned student {-10 * math.log10(mse):.2f} dB" in text


def test_every_image_has_an_alt_text_and_a_size(whole_page: Page) -> None:
    images = whole_page.images
    # the hero image; of each view the ground truth, the color bar, three renders, three error maps
    assert len(images) == 1 + 3 * (1 + 1 + 3 + 3)
    assert all(image["alt"] and int(image["width"] or 0) > 0 for image in images)


def test_a_resumed_curve_keeps_the_last_value_of_a_step(run: Run) -> None:
    path = run.path / "teacher" / "metrics.jsonl"
    lines = [{"step": 10, "psnr_db": 1.0}, {"step": 20, "psnr_db": 2.0}, {"step": 10, "psnr_db": 3}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30, "ps')
    record(run, "teacher", path.name)
    assert RunData.read(run).curve("teacher") == ([10, 20], [3, 2])


def test_templates_escape_text_and_refuse_unknown_names() -> None:
    assert (
        ENVIRONMENT.from_string("{{ x }}{{ y }}").render(x='<a"', y=Markup("<i>"))
        == "&lt;a&#34;<i>"
    )
    with pytest.raises(UndefinedError):
        page("bench.html.j2", title="misspelled", devices=[], failed=[])


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (quantities.milliseconds, 0.4123, "0.412 ms"),
        (quantities.milliseconds, 4.126, "4.13 ms"),
        (quantities.milliseconds, 41.26, "41.3 ms"),
        (quantities.milliseconds, 1234.5, "1,234 ms"),
        (quantities.milliseconds, math.nan, "not available"),
        (quantities.milliseconds, "4", "not available"),
        (quantities.decibels, 27.005, "27.00 dB"),
        (quantities.decibels, -1.5, "−1.50 dB"),
        (quantities.decibels, math.inf, "∞"),
        (quantities.decibels, True, "not available"),
        (quantities.size, 999, "999 B"),
        (quantities.size, 251_904, "252 kB"),
        (quantities.size, 999_999, "1000 kB"),
        (quantities.size, 8_300_000, "8.3 MB"),
        (quantities.large, 50.64e9, "50.6 G"),
        (quantities.whole, 4_305_539, "4,305,539"),
        (quantities.duration, 6.64, "6.6 s"),
        (quantities.duration, 119, "119 s"),
        (quantities.duration, 5400, "90 min"),
        (quantities.duration, 7260, "2 h 01 min"),
        (quantities.scientific, 0.0, "0"),
        (quantities.scientific, None, "not available"),
    ],
)  # fmt: skip
def test_number_formats(function: Callable[[object], str], value: object, text: str) -> None:
    assert function(value) == text


def test_charts_use_css_variables_and_are_deterministic() -> None:
    def draw() -> str:
        curve = ([1, 2, 3], [10.0, 12.0, 13.0])
        return training_chart(curve, name="$\\bad{ 漢字 <b>", color=TEACHER, test_db=12.5)

    chart = draw()
    assert chart == draw()
    assert "var(--teacher)" in chart
    assert not any(color in chart for color in PAINTS.values())
    assert "<b>" not in chart
    assert "<style" not in chart
    assert "<metadata" not in chart
    assert ">training step<" in chart  # text stays text


def test_the_pareto_front_holds_what_no_other_student_beats() -> None:
    one = Trial.from_json(sample_trials()[0])
    draws = np.random.default_rng(0).integers(0, 12, (60, 2)).astype(float)
    trials = [replace(one, latency_ms=x, psnr_db=y) for x, y in draws.tolist()]
    front = {(trial.latency_ms, trial.psnr_db) for trial in pareto_front(trials)}
    points = {(x, y) for x, y in draws.tolist()}
    for x, y in points:
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
        assert ((x, y) in front) == (not beaten)


def test_error_maps_show_the_stated_multiple() -> None:
    truth = np.full((4, 5, 3), 100, np.uint8)
    image = truth.copy()
    image[1, 2] += 17  # a third of the scale: 5 * 17 / 255
    image[3, 3] -= 90  # beyond it
    shown = page_images.error_map(image, truth)
    scale = matplotlib.colormaps["magma"]
    for place, level in (((0, 0), 0.0), ((1, 2), 1 / 3), ((3, 3), 1.0)):
        np.testing.assert_array_equal(shown[place], np.rint(255 * np.array(scale(level)[:3])))
    assert page_images.psnr_db(truth, truth) == math.inf


def test_images_are_lossless_until_the_page_gets_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    with Image.open(io.BytesIO(page_images.webp(noise))) as stored:
        np.testing.assert_array_equal(np.asarray(stored.convert("RGB")), noise)
    assert page_images.compression_for([noise]).quality is None
    monkeypatch.setattr(page_images, "PAGE_BYTES", 3 * len(page_images.webp(noise)))
    chosen = page_images.compression_for([noise])
    assert chosen.quality is not None
    stored_bytes = chosen.views * len(page_images.webp(noise, chosen.quality))
    assert stored_bytes <= page_images.PAGE_BYTES


@pytest.mark.parametrize(
    ("width", "shown"), [(24, 288), (100, 300), (150, 300), (200, 300), (800, 300)]
)
def test_small_images_are_enlarged_by_a_whole_factor(width: int, shown: int) -> None:
    assert page_images.shown_width(width) == shown
    assert page_images.page_image(np.zeros((8, width, 3), np.uint8), "black").crisp == (
        width <= 150
    )


def test_a_forward_scene_without_validation_views_is_described(
    scene: Scene, tmp_path: Path
) -> None:
    def make(stage: StageWriter) -> None:
        save_scene(replace(scene, source="llff", name="fern"), stage.path)

    run = Run(tmp_path / "fern")
    run.perform("scene", {}, {}, make)
    text = report_of(run).text
    assert "“fern” in LLFF format (24 × 24 pixels; 3 training images" in text
    assert "nothing has been trained yet" in text
