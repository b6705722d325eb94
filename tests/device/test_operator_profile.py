import json

import pytest
from small_graphs import write_graph

from device.host import HostTarget
from device.operator_profile import NodeTime, fallback_nodes, operator_times, read_profile
from lightfield.errors import DeviceError

# Events as ONNX Runtime 1.31 writes them, shortened; older ones also have fence events.
EVENTS = [
    {"cat": "Session", "name": "model_run", "dur": 900, "args": {}},
    {"cat": "Node", "name": "conv1_fence_before", "dur": 1, "args": {"op_name": "Conv"}},
    *(
        {
            "cat": "Node",
            "name": f"{name}_kernel_time",
            "dur": dur,
            "args": {"op_name": op, "provider": provider, "node_index": "0"},
        }
        for dur, name, op, provider in [
            (9000, "conv1", "Conv", "XnnpackExecutionProvider"),
            (100, "gelu", "Gelu", "CPUExecutionProvider"),
            (600, "conv1", "Conv", "XnnpackExecutionProvider"),
            (200, "gelu", "Gelu", "CPUExecutionProvider"),
            (400, "conv1", "Conv", "XnnpackExecutionProvider"),
            (300, "gelu", "Gelu", "CPUExecutionProvider"),
        ]
    ),
]


def test_only_the_last_runs_of_a_node_count(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(EVENTS))
    nodes = read_profile(path, runs=2)
    assert nodes == (
        NodeTime("conv1", "Conv", "XnnpackExecutionProvider", 0.5),
        NodeTime("gelu", "Gelu", "CPUExecutionProvider", 0.25),
    )
    assert fallback_nodes(nodes, "xnnpack") == ("gelu (Gelu)",)
    assert fallback_nodes(nodes, "cpu") == ("conv1 (Conv)",)


def test_operators_are_summed_and_sorted_by_time():
    cpu, npu = "CPUExecutionProvider", "QNNExecutionProvider"
    nodes = [
        NodeTime("a", "Add", cpu, 1),
        NodeTime("b", "Conv", npu, 5),
        NodeTime("c", "Add", cpu, 2),
    ]
    conv, add = operator_times(nodes)
    assert (conv.operator, conv.nodes, conv.total_ms, conv.share) == ("Conv", 1, 5, 0.625)
    assert (add.operator, add.provider, add.nodes, add.total_ms) == ("Add", cpu, 2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[", "cannot be read"),
        ("[3]", "cannot be read"),
        ('{"a": 1}', "cannot be read"),
        ('[{"cat": "Node", "name": "x_kernel_time", "args": {}}]', "cannot be read"),
        ("[]", "contains no node"),
    ],
)
def test_an_invalid_trace_is_refused(tmp_path, text, message):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(DeviceError, match=message):
        read_profile(path, 1)


def test_the_host_profiles_every_node(tmp_path):
    nodes = HostTarget().profile(write_graph(tmp_path / "g.onnx", layers=3), runs=2)
    assert [node.operator for node in nodes if node.operator == "Conv"] == ["Conv"] * 3
    assert {node.provider for node in nodes} == {"CPUExecutionProvider"}
    assert all(node.median_ms >= 0 for node in nodes)
