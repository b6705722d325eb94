"""`nelf bench` on an emulated phone: its output, and its errors."""

import json
import re
import shutil

import pytest
from attached import attach
from emulated_phone import wait_until
from miniature import CHAIN, manifest, stage, tree

pytestmark = pytest.mark.phone


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the miniature chain up to its benchmark of this machine, with a report."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    for name in CHAIN:
        if name not in ("prune", "lens"):
            assert stage(run, name).done
    return run


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "toy")


@pytest.fixture
def on_phone(request):
    """The options that choose the phone, and the C library for the runner."""
    glibc = request.getfixturevalue("tree") / "arm64/usr/lib/aarch64-linux-gnu"
    return ["--target=phone", f"--phone.glibc={glibc}"]


def numbers_said_in(page: str) -> set[str]:
    """Numbers in the texts and labels of a page, without the coordinates of its curves."""
    labels = re.findall(r'\b(?:aria-label|title)="([^"]*)"', page)
    words = " ".join([re.sub(r"<[^>]*>", " ", page), *labels])
    return set(re.findall(r"\d+(?:\.\d+)?", words))


BRIEF = "--runs=3 --warmup=1 --sustained-seconds=0 --poses=1 --reference-model-runs=0 --no-profile"


def test_latencies_of_an_emulated_phone_are_not_shown(phone, run, on_phone):
    said = stage(run, "bench", *on_phone, *BRIEF.split()).done
    assert "latencies are meaningless" in said
    assert " ms" not in said
    text = (run / "bench/latencies.json").read_text()
    (found,) = json.loads(text)["devices"]
    assert found["device"]["emulated"]
    assert phone.serial not in text
    assert phone.files() == []
    exact = [graph for graph in found["graphs"] if graph["precision"] == "fp32"]
    assert exact
    latencies = [graph["latency"] for graph in found["graphs"] if not graph["refused"]]
    assert len(latencies) >= len(exact)
    assert all(len(each["samples_ms"]) == 3 and each["device"]["emulated"] for each in latencies)
    parities_db = [graph["fidelity"]["psnr_db"] for graph in exact]  # against the host
    assert all(parity_db is None or parity_db > 60 for parity_db in parities_db)

    assert stage(run, "report").done
    page = (run / "report/index.html").read_text()
    assert "emulated device; its times mean nothing and are not shown" in page
    figures = {
        f"{each['statistics'][name]:.2f}"
        for each in latencies
        for name in ("p50_ms", "p90_ms", "mean_ms")
    }
    assert len(figures & numbers_said_in(page)) <= 1  # by chance another figure's


def test_pruning_refuses_an_emulated_phone(phone, run, on_phone):
    before = tree(run)
    refusal = stage(run, "prune", *on_phone).refusal
    assert "the latency of an emulated device is no evidence" in refusal
    assert tree(run) == before
    assert phone.files() == []


def test_target_auto_ignores_an_emulated_phone(phone, run):
    assert stage(run, "bench", "--target=auto").done
    assert manifest(run, "bench")["details"]["device"]["kind"] == "host"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unplugged", "no phone is attached; enable USB debugging"),
        ("off", "the phone is offline; plug the phone in again"),
        ("read_only", "Read-only file system"),
        ("full", r"0\.\d MB of free storage"),
        ("other_processor", "not arm64-v8a"),
    ],
)
def test_an_unusable_phone_is_one_line_and_keeps_the_old_record(
    phone, server, run, on_phone, fault, message
):
    before = tree(run)
    spoil(phone, server, fault)
    refusal = stage(run, "bench", *on_phone, *BRIEF.split()).refusal
    assert re.search(message, refusal)
    assert tree(run) == before


def spoil(phone, server, fault: str) -> None:
    if fault == "unplugged":
        server.disconnect(phone.serial)
    elif fault == "off":
        phone.power_off()
        wait_until(lambda: server.list()[0].state != "device" if server.list() else True)
    elif fault == "read_only":
        phone.make_read_only()
    elif fault == "full":
        phone.fill(spare_bytes=100_000)
    else:
        (phone.state / "getprop").write_text("[ro.product.cpu.abilist]: [armeabi-v7a]\n")


def test_a_serial_with_a_command_is_only_a_name(phone, run, on_phone):
    refusal = stage(run, "bench", *on_phone, "--serial=x; $(touch pwned)").refusal
    assert "no such phone is attached" in refusal
    assert phone.serial in refusal
    assert phone.files() == []


def test_a_phone_unplugged_in_the_middle_keeps_the_earlier_benchmark(phone, server, run, on_phone):
    before = tree(run)
    phone.cable.pull_after(8_000_000, to_phone=True)  # while ONNX Runtime is sent
    refusal = stage(run, "bench", *on_phone, *BRIEF.split()).refusal
    assert "check the cable" in refusal
    assert tree(run) == before
    phone.cable.plug()
    attach(server, phone)
