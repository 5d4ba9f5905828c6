"""ONNX files and VNN-LIB properties: operators against onnxruntime, formulas against a slow reading of them, answers against
brute force, and files that other tools wrote."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("highspy")
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import linprog

from fastrobust.__main__ import main as cli
from fastrobust.runtime.errors import FastrobustError
from fastrobust.verification import properties, vnnlib
from fastrobust.verification.lowering import lower
from fastrobust.verification.onnx_file import OnnxNetwork


def write(path, nodes, shape, out=None, **tensors):
    """An ONNX file of some nodes from x to y."""
    value = lambda name, dims: helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
    kept = [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "small", [value("x", shape)], [value("y", out)], kept)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    onnx.save(made, path)
    return path


def run(path, x: np.ndarray) -> np.ndarray:
    """By another implementation."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.astype(np.float32)})[0]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


whole = lambda *values: np.array(values, np.int64)
IMAGE = (1, 2, 5, 6)
OPERATORS = {  # name: (input shape, [(operator, further inputs, attributes)], tensors)
    "Conv": (IMAGE, ["w", "b"], {"pads": [1, 0, 2, 1], "strides": [2, 1]}, {"w": numbers(3, 2, 3, 2), "b": numbers(3)}),
    "Conv, groups": (IMAGE, ["w"], {"group": 2, "dilations": [2, 1]}, {"w": numbers(4, 1, 2, 3)}),
    "Conv, one dimension": ((1, 2, 7), ["w"], {"pads": [1, 1]}, {"w": numbers(3, 2, 3)}),
    "Gemm": ((1, 5), ["w", "b"], {"transB": 1, "alpha": 0.5, "beta": 2.0}, {"w": numbers(3, 5), "b": numbers(1, 3)}),
    "MatMul": ((1, 5), ["w"], {}, {"w": numbers(5, 3)}),
    "Add": (IMAGE, ["w"], {}, {"w": numbers(2, 1, 1)}),
    "Div": (IMAGE, ["w"], {}, {"w": 1 + numbers(2, 1, 1) ** 2}),
    "Mul": (IMAGE, ["w"], {}, {"w": numbers(1)}),
    "BatchNormalization": (
        IMAGE,
        ["s", "b", "m", "v"],
        {"epsilon": 0.01},
        {"s": numbers(2), "b": numbers(2, seed=1), "m": numbers(2, seed=2), "v": numbers(2) ** 2},
    ),
    "AveragePool": (IMAGE, [], {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [1, 0, 1, 0]}, {}),
    "AveragePool, counted": (IMAGE, [], {"kernel_shape": [2, 3], "pads": [1, 0, 0, 1], "count_include_pad": 1}, {}),
    "MaxPool": (IMAGE, [], {"kernel_shape": [2, 3], "strides": [2, 2]}, {}),
    "GlobalAveragePool": (IMAGE, [], {}, {}),
    "Pad": (IMAGE, ["p", "c"], {}, {"p": whole(0, 0, 1, 2, 0, 0, 0, 1), "c": np.float32(0.3)}),
    "Pad, edge": (IMAGE, ["p"], {"mode": "edge"}, {"p": whole(0, 0, 1, 2, 0, 0, 0, 1)}),
    "Pad, reflect": (IMAGE, ["p"], {"mode": "reflect"}, {"p": whole(0, 0, 1, 2, 0, 0, 0, 1)}),
    "Flatten": (IMAGE, [], {"axis": 2}, {}),
    "Reshape": (IMAGE, ["n"], {}, {"n": whole(0, 3, -1)}),
    "Transpose": (IMAGE, [], {"perm": [0, 2, 3, 1]}, {}),
    "Squeeze": ((1, 3, 1, 2), ["a"], {}, {"a": whole(2)}),
    "Unsqueeze": ((1, 3), ["a"], {}, {"a": whole(0, -1)}),
    "Slice": (IMAGE, ["s", "e", "a", "t"], {}, {"s": whole(1, -4), "e": whole(5, 99), "a": whole(2, 3), "t": whole(2, 1)}),
    "Gather": (IMAGE, ["i"], {"axis": 3}, {"i": whole(4, 0, 0)}),
    "ReduceMean": (IMAGE, [], {"axes": [2, 3], "keepdims": 0}, {}),
    "ReduceSum": (IMAGE, ["a"], {}, {"a": whole(1)}),
    "Relu": (IMAGE, [], {}, {}),
    "LeakyRelu": (IMAGE, [], {"alpha": 0.3}, {}),
    "Neg": (IMAGE, [], {}, {}),
    "Max": (IMAGE, ["w", "v"], {}, {"w": numbers(*IMAGE), "v": numbers(*IMAGE, seed=2)}),
    "Sum": (IMAGE, ["w", "x"], {}, {"w": numbers(*IMAGE)}),
    "Dropout": (IMAGE, [], {}, {}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_those_of_onnxruntime(name, tmp_path):
    shape, inputs, attributes, tensors = OPERATORS[name]
    path = write(
        tmp_path / "one.onnx", [helper.make_node(name.split(",")[0], ["x", *inputs], ["y"], **attributes)], shape, **tensors
    )
    found = OnnxNetwork(path)
    network = lower(found, shape)
    for seed in range(3):
        x = numbers(*shape, seed=seed)
        expected = torch.from_numpy(run(path, x))
        assert found(torch.from_numpy(x)).shape == expected.shape
        assert torch.allclose(found(torch.from_numpy(x)), expected, rtol=0, atol=1e-5)
        assert torch.allclose(network(torch.from_numpy(x))[0], expected.flatten().double(), rtol=0, atol=1e-5)


def test_constants_and_shapes_that_a_file_computes(tmp_path):
    nodes = [
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(numbers(2, 1, 1))),
        helper.make_node("Sub", ["one", "x"], ["d"]),
        helper.make_node("Shape", ["d"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["d", "sizes"], ["r"]),
        helper.make_node("Identity", ["r"], ["i"]),
        helper.make_node("Concat", ["i", "r"], ["y"], axis=-1),
    ]
    path = write(tmp_path / "many.onnx", nodes, IMAGE, zero=whole(0), rest=whole(-1))
    x = numbers(*IMAGE)
    assert torch.allclose(lower(OnnxNetwork(path), IMAGE)(torch.from_numpy(x)).float(), torch.from_numpy(run(path, x)))


# properties


def formula(choose: random.Random, depth: int) -> str:
    if depth and choose.random() < 0.7:
        parts = [formula(choose, depth - 1) for _ in range(choose.randint(0, 3))]
        return f"({choose.choice(['and', 'or'])} {' '.join(parts)})"
    if choose.random() < 0.3:
        return f"({choose.choice(['<=', '>='])} X_{choose.randint(0, 1)} {choose.uniform(-1, 1):.3f})"
    terms = [f"(* {choose.uniform(-2, 2):.2f} Y_0)", "(- Y_1 Y_0)", "(+ Y_0 (- 0.5) Y_1)", "Y_1", "1e-1"]
    return f"({choose.choice(['<=', '>='])} {choose.choice(terms[:-1])}\n {choose.choice(terms)}) ; a comment )\n"


def holds(term, values: dict[str, float]) -> bool | float:
    """A formula by its definition."""
    if isinstance(term, str):
        return values.get(term) if term in values else float(term)
    operator, *parts = [term[0], *(holds(part, values) for part in term[1:])]
    if operator in ("<=", ">="):
        return parts[0] <= parts[1] if operator == "<=" else parts[0] >= parts[1]
    if operator == "-":
        return parts[0] - sum(parts[1:]) if len(parts) > 1 else -parts[0]
    return {"and": all, "or": any, "+": sum, "*": np.prod}[operator](parts)


@pytest.mark.parametrize("seed", range(8))
def test_a_property_means_what_its_formulas_say(seed):
    choose = random.Random(seed)
    formulas = [
        "(and (>= Y_0 -9) (>= X_0 -1) (<= X_0 1))",
        "(<= -1 X_1)",
        "(>= 1 X_1)",
        *(formula(choose, 3) for _ in range(2)),
    ]
    declared = "".join(f"(declare-const {v} Real)" for v in ("X_0", "X_1", "Y_0", "Y_1"))
    cases = vnnlib.parse(declared + "".join(f"(assert {f}\n)" for f in formulas))
    trees = [vnnlib.nested(re.sub(";.*", "", f))[0] for f in formulas]
    answers = set()
    for _ in range(500):
        x, y = np.random.default_rng(choose.randint(0, 10**9)).uniform(-1.2, 1.2, (2, 2))
        values = dict(zip(("X_0", "X_1", "Y_0", "Y_1"), (*x, *y), strict=True))
        expected, x, y = all(holds(tree, values) for tree in trees), torch.from_numpy(x), torch.from_numpy(y[None])
        inside = [case for case in cases if (x >= case.low).all() and (x <= case.high).all()]
        assert any((case.values(y) <= 0).any() for case in inside) == expected
        answers.add(expected)
    assert answers


DECLARED = "(declare-const X_0 Real)(declare-const Y_0 Real)"
BOX = "(assert (<= X_0 1))(assert (>= X_0 0))"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DECLARED + BOX, "nothing about the outputs"),
        (DECLARED + "(assert (<= X_0 1))(assert (<= Y_0 1))", "X_0 has no lower or no upper bound"),
        (DECLARED + BOX + "(assert (<= Y_0 X_0))", "ties Y_0, X_0 together"),
        (DECLARED + BOX + "(assert (<= (* Y_0 Y_0) 1))", r"\(\* Y_0 Y_0\) is not understood"),
        (DECLARED + BOX + "(assert (< Y_0 1))", r"\(< Y_0 1\) is not understood"),
        (DECLARED + BOX + "(assert (<= Y_1 1))", "Y_1"),
        (DECLARED + BOX + "(assert (<= Y_0 1)", "is the file whole"),
        (DECLARED + BOX + "(assert (<= Y_0 1)))", "too many"),
        (DECLARED + "(check-sat)", "check-sat"),
        ("(declare-const X_1 Real)(declare-const Y_0 Real)", "without a gap"),
        ("", "must declare"),
        (DECLARED + BOX + "(assert (or (<= Y_0 1) (<= Y_0 2)))" * 11, "more than 1,000"),
    ],
)
def test_what_is_no_property_is_refused(text, words, monkeypatch):
    monkeypatch.setattr(vnnlib, "MOST", 1000)
    with pytest.raises(FastrobustError, match=words):
        vnnlib.parse(text)


# answers


def brute_force(layers: list[np.ndarray], case: vnnlib.Case) -> bool:
    """Whether a counterexample exists, for two linear layers with a ReLU between: a linear program for each pattern of signs
    and each group."""
    (w, b), (v, c) = layers
    box = list(zip(case.low.tolist(), case.high.tolist(), strict=True))
    for signs in itertools.product((0, 1), repeat=len(b)):
        on = np.array(signs)
        sides = np.where(on, -1, 1)[:, None]
        for weight, bias in case.groups:
            rows = weight.numpy() @ (v * on)
            matrix = np.vstack([sides * w, rows @ w])
            limits = np.concatenate([-sides[:, 0] * b, -(rows @ b + weight.numpy() @ c + bias.numpy())])
            if linprog(np.zeros(w.shape[1]), matrix, limits, bounds=box, method="highs").status == 0:
                return True
    return False


def exported(tmp_path, seed: int) -> tuple:
    """(a file that torch wrote, the layers)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    path = tmp_path / f"{seed}.onnx"
    torch.onnx.export(model, (torch.zeros(1, 1, 3),), str(path), dynamo=False)
    linear = [m for m in model if isinstance(m, nn.Linear)]
    return path, [(m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in linear]


def asked(choose: random.Random) -> str:
    """Boxes in which one output exceeds the others, or is small: `or` of `and` of both kinds."""
    lines = [f"(declare-const {kind}_{i} Real)" for kind in "XY" for i in range(3)]
    box = lambda i, low, high: f"(>= X_{i} {low:.4f}) (<= X_{i} {high:.4f})"
    ends = [sorted(choose.uniform(-1, 1) for _ in range(2)) for _ in range(4)]
    lines += [f"(assert (and {box(i, *ends[i])}))" for i in range(2)]
    lines += [f"(assert (or (and {box(2, *ends[2])}) (and {box(2, *ends[3])})))"]
    level = choose.uniform(0.2, 0.6)
    lines += [f"(assert (or (and (>= Y_0 Y_1) (>= Y_0 Y_2) (>= Y_0 {level:.3f})) (and (<= Y_1 {-level:.3f}))))"]
    return "\n".join(lines)


def test_answers_are_those_of_brute_force_on_a_network_that_torch_wrote(tmp_path):
    answers = []
    for seed in range(8):
        path, layers = exported(tmp_path, seed % 3)
        choose, file = random.Random(seed), tmp_path / "property.vnnlib"
        file.write_text(asked(choose))
        cases = vnnlib.read(file)
        assert len(cases) == 2 and all(len(case.groups) == 2 for case in cases)
        answer = properties.verify(path, file, 20)
        assert answer.answer == ("sat" if any(brute_force(layers, case) for case in cases) else "unsat")
        if answer.answer == "sat":
            outputs = torch.from_numpy(run(path, answer.inputs.numpy().reshape(1, 1, 3)))
            assert torch.allclose(outputs[0], answer.outputs, atol=1e-5)
            inside = [c for c in cases if (answer.inputs >= c.low).all() and (answer.inputs <= c.high).all()]
            assert any((case.values(outputs.double()) <= 1e-5).any() for case in inside)
        answers.append(answer.answer)
    assert min(answers.count("sat"), answers.count("unsat")) > 1


@pytest.mark.parametrize("steps", [0, 100])
def test_the_search_finds_what_the_attack_does_not(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(properties, "STEPS", steps)
    path, _ = exported(tmp_path, 0)
    (tmp_path / "p.vnnlib").write_text(asked(random.Random(1)))
    answer = properties.verify(path, tmp_path / "p.vnnlib", 20)
    assert answer.answer == "sat" and (answer.by == "attack") == (steps > 0)


def test_a_residual_network_with_batchnorm_that_torch_wrote(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(2, 2, 3, 1, 1), nn.BatchNorm2d(2), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.relu(self.norm(self.conv(x))) + x
            return self.last(torch.nn.functional.avg_pool2d(torch.relu(h), 2).flatten(1))

    torch.manual_seed(0)
    model, path = Net(), tmp_path / "net.onnx"
    model(torch.randn(9, 2, 4, 4))
    torch.onnx.export(model.eval(), (torch.zeros(1, 2, 4, 4),), str(path), dynamo=False, do_constant_folding=False)
    assert len(onnx.load(path).graph.node) > 5
    x = torch.rand(4, 2, 4, 4)
    network = lower(OnnxNetwork(path), (1, 2, 4, 4))
    assert torch.allclose(network(x).float(), model(x), rtol=0, atol=1e-5) and len(network.relus) == 2


@pytest.fixture
def files(tmp_path):
    path, _ = exported(tmp_path, 0)
    file = tmp_path / "p.vnnlib"
    file.write_text(asked(random.Random(1)))
    return path, file


def test_the_command_writes_what_the_competition_reads(files, tmp_path, capsys):
    path, file = files
    for kept in files:
        kept.with_suffix(f"{kept.suffix}.gz").write_bytes(gzip.compress(kept.read_bytes()))
    assert cli(["verify", f"{path}.gz", "--vnnlib", f"{file}.gz", "-o", str(tmp_path / "answer.txt"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["answer"] == "sat" and told["by"] == "attack"
    assert cli(["verify", str(path), "--vnnlib", str(file)]) == 0
    assert capsys.readouterr().out == (tmp_path / "answer.txt").read_text()
    first, rest = (tmp_path / "answer.txt").read_text().split("\n", 1)
    assert first == "sat" and rest.startswith("((X_0 ") and rest.endswith(")\n)\n")
    parts = [
        part.strip().removeprefix("(").split(" ")
        for part in rest.strip()[1:-1].replace("\n", " ").split(")")
        if part.strip()
    ]
    assert [name for name, _ in parts] == [f"{kind}_{i}" for kind in "XY" for i in range(3)]
    x, y = np.array([float(v) for _, v in parts]).reshape(2, 3)
    assert np.abs(run(path, x.reshape(1, 1, 3))[0] - y).max() < 1e-4


def test_files_that_cannot_be_used_are_errors(files, tmp_path, capsys, monkeypatch):
    path, file = map(str, files)
    soft = write(tmp_path / "soft.onnx", [helper.make_node("Softmax", ["x"], ["y"], name="last")], (1, 1, 3))
    wide = write(tmp_path / "wide.onnx", [helper.make_node("Relu", ["x"], ["y"])], (1, 4))
    rounds = [helper.make_node("Cast", ["x"], ["h"], name="half", to=10), helper.make_node("Cast", ["h"], ["y"], to=1)]
    half = write(tmp_path / "half.onnx", rounds, (1, 1, 3))
    more = write(tmp_path / "more.onnx", [helper.make_node("Concat", ["x", "x"], ["y"], axis=-1)], (1, 3))
    (tmp_path / "no.onnx").write_text("nothing")
    for options, words in (
        ([str(soft), "--vnnlib", file], "Softmax ('last') is not supported"),
        ([str(half), "--vnnlib", file], "Cast ('half') is not supported: a Cast to type 10"),
        ([str(wide), "--vnnlib", file], "the property has 3 inputs"),
        ([str(more), "--vnnlib", file], "the property has 3 outputs"),
        ([str(tmp_path / "no.onnx"), "--vnnlib", file], "is not an ONNX file"),
        ([str(tmp_path / "absent.onnx"), "--vnnlib", file], "absent.onnx cannot be read"),
        ([path, "--vnnlib", str(tmp_path / "absent")], "absent cannot be read"),
        ([path, "--vnnlib", path], "is not a VNN-LIB file"),
        ([path], "--vnnlib FILE"),
        ([path, "--vnnlib", file, "--epsilon", "0.1"], "--epsilon says nothing"),
        (["runs/mine", "--vnnlib", file], "NETWORK.onnx"),
        (["runs/mine"], "needs a radius"),
    ):
        assert cli(["verify", *options]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert cli(["verify", path, "--vnnlib", file]) == 2
    assert "ONNX files need onnx: pip install 'highspy>=" in capsys.readouterr().err


def test_a_file_that_is_run_otherwise_than_by_onnxruntime_is_an_error(files, monkeypatch):
    from fastrobust.verification import onnx_file

    monkeypatch.setitem(onnx_file.OPERATORS, "Relu", lambda _, x: x)
    with pytest.raises(FastrobustError, match="not what onnxruntime computes"):
        properties.verify(*files, 10)


def test_no_time_gives_no_answer(files, monkeypatch):
    monkeypatch.setattr(properties, "STEPS", 0)
    assert properties.verify(*files, 1e-9).answer == "timeout"
