"""The records of measured runs, the pages that are made from them, and the records made from runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightfield.run import Run, StageWriter
from tools import record, results
from tools.results_schema import (
    NOT_RECORDED,
    Figure,
    Record,
    RecordError,
    load_record,
    load_records,
    parse_record,
)
from tools.results_tables import Column, Row, Table

ROOT = Path(__file__).resolve().parents[1]
LONGEST_SENTENCE = 30
LONGEST_RESULTS = 120


def valid_record(**changes: Any) -> dict[str, Any]:
    fields = {
        "schema": 1,
        "name": "cup",
        "description": "A cup on two cores.",
        "date": "2026-11-30",
        "hardware": {"host": "two cores"},
        "software": {"torch": "2.13"},
        "commit": "0a67d7b",
        "command": ["nelf student --run R"],
        "seed": 0,
        "figures": [{"name": "student_psnr", "value": 30.5, "unit": "dB", "interval": [30, 31]}],
    }
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def figure(**changes: Any) -> list[dict[str, Any]]:
    entry = {"name": "student_psnr", "value": 30.5, "unit": "dB", **changes}
    return [{name: value for name, value in entry.items() if value is not None}]


@pytest.fixture(scope="module")
def records() -> dict[str, Record]:
    return load_records(results.RECORDS)


# --- the committed pages


def test_the_results_are_what_the_records_give(records):
    assert results.PAGE.read_text(encoding="utf-8") == results.results_page(records), (
        "run `make results`"
    )


def test_the_table_of_the_readme_is_what_the_records_give(records):
    readme = results.README.read_text(encoding="utf-8")
    assert readme == results.with_table(readme, records), "run `make results`"


def test_the_results_are_short():
    assert len(results.PAGE.read_text(encoding="utf-8").splitlines()) <= LONGEST_RESULTS


def test_links_of_the_pages_lead_to_files():
    for page in (results.PAGE, results.README, ROOT / "docs" / "log.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def sentences(markdown: str) -> list[str]:
    """The sentences of a Markdown text, without code blocks, tables, images and addresses."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = "\n".join("" if line.startswith(("|", "#")) else line for line in text.splitlines())
    blocks = re.split(r"\n\s*\n|\n(?=- |\d+\. )", text)
    return [s for block in blocks for s in re.split(r"(?<=[.!?])\s+", " ".join(block.split())) if s]


def test_no_sentence_of_the_readme_is_long():
    for sentence in sentences(results.README.read_text(encoding="utf-8")):
        assert len(sentence.split()) <= LONGEST_SENTENCE, sentence


def test_sentences_are_told_apart():
    text = (
        "# Title\nOne [two](a.md) `three four`. Five!\n\n| a |\n- six\n- seven\n```sh\neight\n```\n"
    )
    assert sentences(text) == ["One two code.", "Five!", "- six", "- seven"]


# --- the log

VERDICTS = {
    "kept", "negative", "equal", "measured", "fixed", "failed run", "open", "superseded",
}  # fmt: skip


def log_entries() -> list[tuple[str, str]]:
    """Heading and text of each entry of the log."""
    text = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    parts = re.split(r"^(##+) (.*)\n", text, flags=re.MULTILINE)[1:]
    marked = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return [(heading, body) for marks, heading, body in marked if marks == "###"]


@pytest.mark.parametrize(("heading", "body"), log_entries(), ids=lambda text: text[:40])
def test_an_entry_of_the_log_is_a_verdict_a_sentence_and_a_table(heading, body):
    verdict = re.search(r"\(([^()]+)\)$", heading)
    assert verdict is not None
    assert verdict[1] in VERDICTS
    before, table, _ = re.split(r"((?:^\|.*\n)+)", body, maxsplit=1, flags=re.MULTILINE)
    assert len(sentences(before)) == 1, sentences(before)
    lines = [re.split(r"(?<!\\)\|", line.strip("|\n")) for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    assert not any(" / " in cell for line in lines for cell in line)


# --- what a record must hold


def test_a_record_is_read(tmp_path):
    path = tmp_path / "cup.json"
    path.write_text(json.dumps(valid_record()))
    cup = load_record(path)
    assert cup.figures["student_psnr"] == Figure("student_psnr", "dB", 30.5, 30.5, (30, 31))
    assert cup.seed == 0


@pytest.mark.parametrize(
    "field",
    ["name", "description", "date", "hardware", "software", "commit", "command", "seed", "figures"],
)
def test_a_missing_field_is_refused_in_one_line(tmp_path, field):
    path = tmp_path / "cup.json"
    path.write_text(json.dumps(valid_record(**{field: None})))
    with pytest.raises(RecordError) as raised:
        load_record(path)
    assert str(raised.value) == f"{path}: the field `{field}` is missing"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"schema": 2}, "`schema` must be 1"),
        ({"name": "mug"}, "`name` must be the name of the file"),
        ({"hosts": "x"}, "unknown field `hosts`"),
        ({"date": "30.11.2026"}, "`date` must be YYYY-MM-DD"),
        ({"hardware": {}}, "at least one machine"),
        ({"software": ["torch"]}, "`software` must map"),
        ({"command": []}, "`command` must be a list"),
        ({"seed": "0"}, "`seed` must be a whole number"),
        ({"commit": NOT_RECORDED}, "the `note` must say why"),
        ({"figures": []}, "`figures` must be a list"),
        ({"figures": figure() * 2}, "`student_psnr` is there twice"),
        ({"figures": figure(name=None)}, "a figure has no `name`"),
        ({"figures": figure(unit=None)}, "figure `student_psnr`: the field `unit` is missing"),
        ({"figures": figure(unit="bel")}, "figure `student_psnr`: unknown unit 'bel'"),
        ({"figures": figure(value="30.5")}, "`value` must be a number"),
        ({"figures": figure(value=None)}, "needs a value or a range"),
        ({"figures": figure(range=[30, 31])}, "needs a value or a range"),
        ({"figures": figure(interval=[31, 32])}, "`interval` must be two numbers around"),
        ({"figures": figure(machine="phone")}, "`machine` must be one of host"),
        ({"figures": figure(decimals=-1)}, "`decimals` must be a whole number"),
        ({"figures": figure(spread=1)}, "unknown field `spread`"),
    ],
)
def test_a_faulty_record_is_refused_in_one_line(changes, fault):
    with pytest.raises(RecordError, match=re.escape(fault)) as raised:
        parse_record(valid_record(**changes), "cup")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_json_is_refused_in_one_line(tmp_path):
    path = tmp_path / "cup.json"
    path.write_text("{")
    with pytest.raises(RecordError, match=r"cup\.json: Expecting") as raised:
        load_record(path)
    assert "\n" not in str(raised.value)


def test_the_command_prints_the_fault_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "cup.json").write_text(json.dumps(valid_record(figures=figure(unit="bel"))))
    monkeypatch.setattr(results, "RECORDS", tmp_path)
    assert results.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- how tables are made


def record_of_figures(**figures: Figure) -> dict[str, Record]:
    return {"cup": Record("cup", "", "", {"host": "x"}, {}, "", [], 0, figures, "")}


def test_a_table_shows_figures_as_they_were_recorded():
    cup = record_of_figures(
        student_psnr=Figure("student_psnr", "dB", 30.6, 30.6, (30.1, 31.0), 2),
        student_parameters=Figure("student_parameters", "1", 4397571, 4397571),
        student_rays=Figure("student_rays", "rays/s", 2600000, 3000000),
        student_size=Figure("student_size", "MB", 9.0, 9.0, None, 1),
    )
    table = Table(
        "network",
        (
            Column("PSNR", "psnr", "dB"),
            Column("interval", "psnr", "dB", interval=True),
            Column("parameters", "parameters"),
            Column("speed", "rays", "rays/s", 1, 1e6),
            Column("size", "size", None),
        ),
        (Row("cup", "cup", "student"),),
    )
    head, _, row = results.table_text(table, cup).splitlines()
    assert head == (
        "| network | PSNR (dB) | interval (dB) | parameters | speed (Mrays/s) | size | record |"
    )
    assert row == (
        "| cup | 30.60 | 30.10 to 31.00 | 4,397,571 | 2.6 to 3.0 | 9.0 MB | [cup](records/cup.json) |"
    )


@pytest.mark.parametrize(
    ("column", "row", "fault"),
    [
        (Column("PSNR", "psnr", "dB"), Row("cup", "mug", "student"), "needs this record"),
        (Column("PSNR", "psnr", "ms"), Row("cup", "cup", "student"), "is in dB, its column in ms"),
        (Column("PSNR", "psnr", "dB"), Row("cup", "cup", "teacher"), "no figure in the row `cup`"),
    ],
)
def test_a_table_without_its_figures_is_refused(column, row, fault):
    cup = record_of_figures(student_psnr=Figure("student_psnr", "dB", 30.6, 30.6))
    with pytest.raises(RecordError, match=fault):
        results.table_text(Table("network", (column,), (row,)), cup)


def test_a_sentence_takes_its_figures_from_records():
    cup = record_of_figures(whole_time=Figure("whole_time", "s", 761, 761))
    assert results.with_figures("It took {cup:whole_time}.", cup) == "It took 761 s."
    with pytest.raises(RecordError, match=r"needs the figure \{cup:time\}"):
        results.with_figures("It took {cup:time}.", cup)


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(1154, 2, "1,154"), (-0.005, 3, "-0.005"), (4.7e-5, 1, "4.7e-5"), (18.3109, 2, "18.31")],
)
def test_a_number_is_written_plainly(value, decimals, text):
    assert results.number_text(value, decimals) == text


# --- records of runs


@pytest.fixture
def run(tmp_path) -> Run:
    made = Run(tmp_path / "cup")

    def student(stage: StageWriter) -> None:
        stage.metrics.update(psnr_db=30.25, ssim=0.9, lpips=None, macs=2_000_000_000)

    def pruned(stage: StageWriter) -> None:
        stage.metrics.update(latency_ms=2.5, ratio=0.5, clock="quiet", size_bytes=10)
        stage.details["device"] = {"kind": "host", "name": "x", "emulated": False}

    made.perform("student", {"distill": {"seed": 3}}, {}, student)
    made.perform("prune", {"seed": 3}, {}, pruned)
    edited(made, "student", started="2026-11-30T10:00:00+00:00")
    edited(made, "prune", started="2026-11-30T10:00:01+00:00")
    return made


def edited(run: Run, stage: str, **changes: Any) -> None:
    path = run.path / stage / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


PHONE = {
    "kind": "phone",
    "name": "Pixel 8",
    "system": "Android 14",
    "runtime": "onnxruntime 1.22.0",
    "provider": "cpu",
    "threads": 1,
    "emulated": False,
}


def test_a_run_becomes_a_record(run, tmp_path, capsys):
    words = [str(run.path), "--name", "cup-run", "--description", "A cup.", "--note", "Quiet."]
    assert record.main([*words, "--folder", str(tmp_path)]) == 0
    cup = load_record(tmp_path / "cup-run.json")
    assert cup.seed == 3
    assert cup.command == ["nelf student --run cup", "nelf prune --run cup"]
    assert cup.hardware == {"host": record.this_machine()}
    assert cup.figures["student_psnr"] == Figure("student_psnr", "dB", 30.25, 30.25, machine="host")
    assert {name: figure.unit for name, figure in cup.figures.items()} == {
        "student_psnr": "dB",
        "student_ssim": "1",
        "student_macs": "GMAC",
        "student_stage_time": "s",
        "prune_latency": "ms",
        "prune_latency_ratio": "1",
        "prune_file_size": "B",
        "prune_stage_time": "s",
    }
    assert json.loads((tmp_path / "cup-run.json").read_text())["config"]["prune"] == {"seed": 3}
    assert record.main([*words, "--folder", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err


def test_latencies_of_a_phone_name_the_phone(run):
    edited(run, "prune", details={"device": PHONE})
    made = record.record_of(run.path, "cup", "A cup.")
    assert made["hardware"]["phone"] == "Pixel 8, Android 14, onnxruntime 1.22.0, cpu, 1 thread"
    machines = {figure["name"]: figure["machine"] for figure in made["figures"]}
    assert machines["prune_latency"] == machines["prune_latency_ratio"] == "phone"
    assert machines["prune_stage_time"] == machines["student_psnr"] == "host"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"details": {"device": {**PHONE, "emulated": True}}}, "is emulated"),
        ({"details": {"devices": [PHONE, {**PHONE, "name": "Pixel 9"}]}}, "several phones"),
        ({"machine": "aarch64, 99 cores"}, "was made on another machine"),
    ],
)
def test_a_run_whose_figures_would_mislead_is_refused(run, tmp_path, capsys, changes, fault):
    edited(run, "prune", **changes)
    words = [str(run.path), "--name", "cup", "--description", "A cup."]
    assert record.main([*words, "--folder", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert fault in said
    assert said.count("\n") == 1


def test_what_a_run_does_not_say_is_said_to_be_unknown(run):
    edited(run, "prune", git_commit=None, config={"seed": 4})
    made = record.record_of(run.path, "cup", "A cup.")
    assert made["commit"] == made["seed"] == NOT_RECORDED
    assert "commit" in made["note"]
    assert "seed" in made["note"]


def test_commits_of_different_stages_are_told_apart(run):
    edited(run, "student", git_commit="aaa")
    edited(run, "prune", git_commit="bbb")
    made = record.record_of(run.path, "cup", "A cup.")
    assert made["commit"] == "aaa (student), bbb (prune)"


def test_a_folder_without_stages_is_refused(tmp_path):
    with pytest.raises(RecordError, match="holds no finished stage"):
        record.record_of(tmp_path, "cup", "A cup.")
