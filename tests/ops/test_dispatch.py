"""Which GPU backend is taken: the table that `make gpu` makes, how it is made from times, and how the ops ask it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import spcl_fast as sf
from benchmarks import shapes
from benchmarks.gpu import choice as choice_of_backend
from spcl_fast import backends, ops
from spcl_fast.backends import measured
from spcl_fast.backends.contract import Ask, Contrast, Wanted
from spcl_fast.cli import doctor
from spcl_fast.ops import recorded_contrast

ROOT = Path(__file__).resolve().parents[2]

GPU = torch.device("cuda", 0)
CONTRAST, MOMENTS, ENTROPY, PREDICTION = (
    "contrast forward + backward",
    "class_moments",
    *list(choice_of_backend.OPS)[2:],
)
CHECKED = {name: {"state": "ok"} for name in choice_of_backend.CHECKS}


def row(op, shape, dtype, us, *, wall=None, spread=0.01) -> dict:
    """A timed row; `wall` is the caller's time (default as the GPU's), `spread` the share to either side. Every time here is made up."""
    *sizes, classes = shapes.CONTRAST.get(shape) or (*shapes.UPSAMPLED[shape][1], shapes.UPSAMPLED[shape][0][1])
    batch, dim, height, width = sizes if len(sizes) == 4 else (shapes.UPSAMPLED[shape][0][0], classes, *sizes)
    times = {"us": us, "graph_us": us, "wall_us": us if wall is None else wall}
    around = {way: [t * (1 - spread), t * (1 + spread)] for way, t in times.items()}
    facts = {"values": batch * dim * height * width, "num_classes": classes, "dim": dim}
    return {"op": op, "shape": shape, "dtype": dtype, **times, "spread": around, "sizes": facts}


def results(triton: list[dict], cuda: list[dict], capability: str = "9.0", **more_parts) -> dict:
    machine = {"gpu": "A made-up GPU", "capability": capability}
    parts = CHECKED | {"x": {"state": "ok", "rows": triton}, "x_cuda": {"state": "ok", "rows": cuda}} | more_parts
    return {"machine": machine, "date": "2031-02-03", "sources": "0" * 16, "parts": parts}


def contest(triton: dict, cuda: dict) -> list[str]:
    """The order of one class, from one row each: arguments of `row` beyond the shape."""
    arguments = (CONTRAST, "A", "bfloat16")
    (choice,) = choice_of_backend.choices(results([row(*arguments, **triton)], [row(*arguments, **cuda)])["parts"])
    return choice["order"]


@pytest.fixture
def table(monkeypatch, tmp_path):
    """An empty place for the table, a GPU of capability 9.0 that is not there, and backends that can do everything."""
    monkeypatch.setattr(measured, "PATH", tmp_path / "measured.json")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "why_not", lambda backend, ask: None)
    monkeypatch.delenv("SPCL_FAST_BACKEND", raising=False)
    forget()
    yield measured.PATH
    forget()


def forget():
    measured.table.cache_clear()
    measured.architecture.cache_clear()


def write(path: Path, *arguments, **keywords) -> str:
    said = choice_of_backend.write(results(*arguments, **keywords), path)
    forget()
    return said


def pick(op, dtype=torch.bfloat16, *, num_classes=19, dim=256, small=False, backend=None):
    return backends.pick(Ask(op, GPU, dtype, num_classes, dim, small), backend)


# ---------------------------------------------------------------------------------------------- what is taken


def test_without_a_table_triton_is_taken(table):
    assert {
        pick(op, dtype, small=small) for op in backends.OPS for dtype in measured.KINDS for small in (True, False)
    } == {"triton"}


def test_the_measured_winner_of_op_dtype_and_size_is_taken_and_no_other(table):
    shapes = {CONTRAST: ("A", "B", "C", "S"), MOMENTS: ("A", "D"), ENTROPY: ("U1",), PREDICTION: ("U3",)}
    both = [(op, shape, dtype) for op in shapes for shape in shapes[op] for dtype in ("bfloat16", "float32")]
    won = {
        (CONTRAST, "A", "bfloat16"),
        (CONTRAST, "S", "float32"),
        (MOMENTS, "D", "float32"),
        (PREDICTION, "U3", "bfloat16"),
    }
    write(table, [row(*which, 100) for which in both], [row(*which, 50 if which in won else 150) for which in both])
    deep, many, hundreds = {"dim": 2048}, {"num_classes": 150}, {"num_classes": 1900}
    cuda = [
        ("prototype_contrastive_loss", torch.bfloat16, deep), ("prototype_contrastive_loss", torch.float16, deep),
        ("prototype_contrastive_loss", torch.float32, {"small": True}), ("class_moments", torch.float32, hundreds),
        ("upsampled_prediction", torch.bfloat16, many), ("upsampled_prediction", torch.float16, many),
    ]  # fmt: skip
    taken = [
        (op, dtype, sizes)
        for op in backends.OPS
        for dtype in (*measured.KINDS, torch.float64)
        for sizes in ({}, deep, many, hundreds, {"small": True})
        if pick(op, dtype, **sizes) == "cuda"
    ]
    assert sorted(map(str, taken)) == sorted(map(str, cuda))


def test_another_architecture_keeps_the_order_of_preference(table, monkeypatch):
    timed = (CONTRAST, "A", "bfloat16")
    write(table, [row(*timed, 100)], [row(*timed, 50)])
    assert pick("prototype_contrastive_loss", dim=2048) == "cuda"
    forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert pick("prototype_contrastive_loss", dim=2048) == "triton"


def test_a_winner_that_is_not_usable_leaves_the_work_to_the_next(table, monkeypatch):
    timed = (CONTRAST, "A", "bfloat16")
    write(table, [row(*timed, 100)], [row(*timed, 50)])
    missing = {"cuda"}
    monkeypatch.setattr(backends, "why_not", lambda backend, ask: "not built" if backend in missing else None)
    assert pick("prototype_contrastive_loss", dim=2048) == "triton"
    missing.add("triton")
    assert pick("prototype_contrastive_loss", dim=2048) == "reference"
    with pytest.raises(RuntimeError, match="'cuda' was asked for and cannot be used: not built"):
        pick("prototype_contrastive_loss", dim=2048, backend="cuda")


def test_a_backend_that_is_asked_for_by_name_is_taken_whatever_was_measured(table, monkeypatch):
    timed = (CONTRAST, "A", "bfloat16")
    write(table, [row(*timed, 100)], [row(*timed, 50)])
    assert pick("prototype_contrastive_loss", dim=2048, backend="triton") == "triton"
    monkeypatch.setenv("SPCL_FAST_BACKEND", "reference")
    assert pick("prototype_contrastive_loss", dim=2048) == "reference"


def test_the_file_is_read_once_and_not_at_every_call(table):
    timed = (CONTRAST, "A", "bfloat16")
    write(table, [row(*timed, 100)], [row(*timed, 50)])
    assert pick("prototype_contrastive_loss", dim=2048) == "cuda"
    table.unlink()
    assert pick("prototype_contrastive_loss", dim=2048) == "cuda"


def broken(*rows: dict) -> str:
    return json.dumps({"sm_90": {"gpu": "x", "date": "y", "rows": rows}})


@pytest.mark.parametrize("text", [
    "", "[1]", '{"sm_80": {"rows": 3}}',
    '{"sm_90": {"gpu": "x"}}', broken({"op": "a"}), broken({"op": "a", "kind": "b", "size": "c", "order": "cuda"}),
])  # fmt: skip
def test_a_broken_table_warns_once_with_its_name_and_stops_nothing(table, text):
    table.write_text(text)
    with pytest.warns(RuntimeWarning, match=r"measured\.json cannot be read.*delete it, or make it again") as seen:
        assert {pick("class_moments") for _ in range(3)} == {"triton"}
    assert len(seen) == 1
    assert "cannot be read" in backends.origin_of_choice("class_moments", GPU)
    timed = (MOMENTS, "B", "bfloat16")
    write(table, [row(*timed, 100)], [row(*timed, 50)])  # as the warning says
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick("class_moments") == "cuda"


# ---------------------------------------------------------------------------------------------- what the ops hand over


@pytest.fixture
def picked(monkeypatch):
    """Every (op, small) that is picked for."""
    seen: list[tuple[str, bool]] = []
    true = backends.pick

    def pick(ask, backend):
        seen.append((ask.op, ask.small))
        return true(ask, backend)

    monkeypatch.setattr(backends, "pick", pick)
    return seen


FEATURES, LABELS, PROTOTYPES = torch.ones(2, 6, 3, 4), torch.zeros(2, 9, 7, dtype=torch.int64), torch.ones(5, 6)
VALUES, UPSAMPLED_VALUES = FEATURES.numel(), 6 * LABELS.numel()


@pytest.mark.parametrize("op, values, call", [
    ("prototype_contrastive_loss", VALUES, lambda: sf.prototype_contrastive_loss(FEATURES, LABELS, PROTOTYPES, temperature=1.0)),
    ("class_moments", VALUES, lambda: sf.class_moments(FEATURES, LABELS, 5)),
    ("class_moments", VALUES, lambda: ops.move_prototypes_(torch.ones(5, 6), FEATURES, LABELS, keep=0.5)),
    ("upsampled_cross_entropy", UPSAMPLED_VALUES, lambda: sf.upsampled_cross_entropy(FEATURES, LABELS)),
    ("upsampled_prediction", UPSAMPLED_VALUES, lambda: sf.upsampled_prediction(FEATURES, tuple(LABELS.shape[1:]))),
], ids=["contrast", "moments", "move_prototypes_", "cross_entropy", "prediction"])  # fmt: skip
def test_an_op_is_small_by_the_values_it_goes_over(picked, monkeypatch, op, values, call):
    for limit, small in ((values + 1, True), (values, False)):
        monkeypatch.setattr(measured, "SMALL_VALUES", limit)
        call()
        assert picked == [(op, small)]
        picked.clear()


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_backward_asks_as_its_forward_did(picked, monkeypatch, small, compiled):
    monkeypatch.setattr(measured, "SMALL_VALUES", VALUES + 1 if small else VALUES)
    features = FEATURES.clone().requires_grad_()

    def loss(features, labels, prototypes):
        return sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0)

    function = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else loss
    function(features, LABELS, PROTOTYPES).backward()
    assert len(picked) >= 2 and set(picked) == {("prototype_contrastive_loss", small)}


def test_a_symbolic_size_is_not_small_and_nothing_is_compiled_again_for_it(picked, monkeypatch):
    monkeypatch.setattr(measured, "SMALL_VALUES", 6 * 100)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(features, labels):
        return sf.prototype_contrastive_loss(features, labels, PROTOTYPES, temperature=1.0)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=count, dynamic=True)
    for side in (3, 20, 4, 30):  # to either side of the limit
        labels = torch.zeros(2, side, side, dtype=torch.int64)
        torch.testing.assert_close(
            compiled(torch.ones(2, 6, side, side), labels), loss(torch.ones(2, 6, side, side), labels)
        )
    small = [small for _, small in picked[1:]]  # the first was asked while tracing
    assert len(graphs) == 1 and small[::2] == [False] * 4 and small[1::2] == [True, False, True, False]


@pytest.mark.parametrize("strict", [True, False])
def test_a_dynamic_export_is_not_bound_to_one_size_class(monkeypatch, strict):
    monkeypatch.setattr(measured, "SMALL_VALUES", 3 * FEATURES[0].numel())

    class Loss(torch.nn.Module):
        def forward(self, features, labels):
            return sf.prototype_contrastive_loss(features, labels, PROTOTYPES, temperature=1.0)

    batch = torch.export.Dim("batch")
    exported = torch.export.export(Loss(), (FEATURES, LABELS), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    many = FEATURES.repeat(3, 1, 1, 1), LABELS.repeat(3, 1, 1)
    assert torch.equal(exported.module()(*many), Loss()(*many))


def test_what_is_traced_saves_what_the_backend_of_its_size_saves(table):
    """At D 256 in float32, with fixed prototypes, Triton keeps the logits and CUDA does not: a fake tensor must follow the choice."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
    write(table, [row(CONTRAST, "S", "float32", 100)], [row(CONTRAST, "S", "float32", 50)])
    with FakeTensorMode():
        features, prototypes = torch.empty(1, 256, 8, 8, device=GPU), torch.empty(19, 256, device=GPU)
        labels = torch.empty(1, 8, 8, dtype=torch.int64, device=GPU)
        problem = Contrast(features, labels, prototypes, None, None, None, 1.0, True, 255, "mean")
        kept = {
            small: list(
                recorded_contrast._forward(*recorded_contrast._pack(problem, Wanted(True, False), "", small))[4].shape
            )
            for small in (True, False)
        }
    assert kept == {True: [0], False: [1, 19, 64]}


# ---------------------------------------------------------------------------------------------- how the table is made


def test_noise_does_not_flip_the_choice():
    assert contest({"us": 100}, {"us": 90}) == ["cuda", "triton"]
    assert contest({"us": 100}, {"us": 90, "spread": 0.2}) == ["triton", "cuda"]  # its slow end is not faster
    assert contest({"us": 100, "spread": 0.2}, {"us": 90}) == ["triton", "cuda"]  # Triton's fast end is
    assert contest({"us": 100, "spread": 0}, {"us": 98, "spread": 0}) == [
        "triton",
        "cuda",
    ]  # steady, and less than two runs differ
    assert contest({"us": 90}, {"us": 100}) == ["triton", "cuda"]


def test_launches_count_beside_the_time_on_the_gpu():
    assert contest({"us": 5, "wall": 100}, {"us": 6, "wall": 40}) == ["cuda", "triton"]
    assert contest({"us": 100, "wall": 200}, {"us": 90, "wall": 260}) == ["triton", "cuda"]


def test_the_shapes_of_one_class_are_one_choice_by_the_sum_of_their_times():
    """U1 and U2 are both large: what is lost at one must be won at the other."""
    triton = [row(ENTROPY, "U1", "float32", 100), row(ENTROPY, "U2", "float32", 100)]
    for second, order in ((60, ["cuda", "triton"]), (90, ["triton", "cuda"])):
        cuda = [row(ENTROPY, "U1", "float32", 110), row(ENTROPY, "U2", "float32", second)]
        (choice,) = choice_of_backend.choices(results(triton, cuda)["parts"])
        assert (choice["order"], choice["shapes"]) == (order, ["U1", "U2"])
        assert choice["us"] == {"triton": 400.0, "cuda": 2.0 * (110 + second)}


def test_what_only_one_backend_can_do_is_no_choice():
    both, alone = row(CONTRAST, "C", "float32", 100), row(CONTRAST, "D", "float32", 100)
    (choice,) = choice_of_backend.choices(results([both, alone], [both])["parts"])
    assert choice["size"] == "many classes"


def test_the_timed_shapes_reach_every_size_class():
    def classes(sizes):
        return {measured.size_class(num_classes=k, dim=d, small=measured.is_small(values)) for values, k, d in sizes}

    features = classes((b * d * h * w, k, d) for b, d, h, w, k in map(shapes.CONTRAST.get, shapes.GPU))
    assert features == {"small", "large", "deep", "many classes", "hundreds of classes"}
    upsampled = classes(
        (b * k * out[0] * out[1], k, k) for (b, k, *_), out in map(shapes.UPSAMPLED.get, shapes.GPU_UPSAMPLED)
    )
    assert upsampled == {"small", "large", "many classes"}


@pytest.mark.parametrize("check, state, word", [
    ("correct", "failed", "correct failed"), ("sanitizer_cuda", "failed", "sanitizer_cuda failed"), ("correct_cuda", None, "did not run"),
])  # fmt: skip
def test_no_choice_is_made_from_times_whose_checks_failed_or_did_not_run(table, check, state, word):
    timed = (CONTRAST, "A", "bfloat16")
    said = write(table, [row(*timed, 100)], [row(*timed, 50)], **{check: {"state": state}})
    assert word in said and "stays as it is" in said and not table.exists()


def test_a_run_that_timed_nothing_on_both_leaves_the_table_alone(table):
    timed = (CONTRAST, "A", "bfloat16")
    write(table, [row(*timed, 100)], [row(*timed, 50)])
    before = table.read_text()
    assert "nothing was timed on both" in write(table, [row(*timed, 100)], []) and table.read_text() == before


def test_other_architectures_stay_in_the_table_and_an_older_run_on_the_same_one_goes(table):
    write(table, [row(CONTRAST, "A", "bfloat16", 100)], [row(CONTRAST, "A", "bfloat16", 50)], capability="8.0")
    write(table, [row(CONTRAST, "A", "bfloat16", 100)], [row(CONTRAST, "A", "bfloat16", 50)])
    write(table, [row(MOMENTS, "A", "bfloat16", 100)], [row(MOMENTS, "A", "bfloat16", 50)])
    found = measured.table()
    assert list(found["sm_80"].orders) == [("prototype_contrastive_loss", "half", "deep")]
    assert list(found["sm_90"].orders) == [("class_moments", "half", "deep")]


def test_the_command_makes_the_table_from_a_result_file(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choice_of_backend.write, "__defaults__", (table,))
    timed = (CONTRAST, "A", "bfloat16")
    result = tmp_path / "gpu.json"
    result.write_text(json.dumps(results([row(*timed, 100)], [row(*timed, 50)])))
    assert choice_of_backend.main([str(result)]) == 0 and "cuda is taken in 1 of 1 classes" in capsys.readouterr().out
    assert pick("prototype_contrastive_loss", dim=2048) == "cuda"
    result.write_text(json.dumps(results([row(*timed, 100)], [row(*timed, 50)], correct={"state": "failed"})))
    assert choice_of_backend.main([str(result)]) == 1


# ---------------------------------------------------------------------------------------------- what doctor says


def said_by_doctor(monkeypatch, device) -> list[str]:
    monkeypatch.setattr(doctor, "self_test", lambda op, backend, device: (0.0, None))
    lines: list[str] = []
    doctor._backends(device, lines.append)
    return lines


def test_doctor_says_what_was_measured_where_and_when(table, monkeypatch):
    both = [(MOMENTS, "A", "bfloat16"), (MOMENTS, "B", "bfloat16"), (MOMENTS, "B", "float32")]
    write(
        table,
        [row(*which, 100) for which in both],
        [row(*which, us) for which, us in zip(both, (50, 100, 50), strict=True)],
    )
    lines = said_by_doctor(monkeypatch, GPU)
    choices = {line.split()[0]: line.partition("choice: ")[2] for line in lines if "choice: " in line}
    assert choices["class_moments"] == (
        "measured on sm_90 (A made-up GPU, 2031-02-03): cuda for fp32 large, half deep; triton for half large; triton first elsewhere"
    )
    assert choices["upsampled_prediction"] == "not measured on this GPU (sm_90): triton first" and set(choices) == set(
        backends.OPS
    )
    assert [line.split()[:3] for line in lines if line.startswith("  class_moments") and " * " in line] == [
        ["class_moments", "cuda", "*"]
    ]


def test_doctor_says_that_nothing_was_measured_and_nothing_of_the_cpu(table, monkeypatch):
    lines = said_by_doctor(monkeypatch, GPU)
    assert sum("choice: not measured on this GPU (sm_90): triton first" in line for line in lines) == len(backends.OPS)
    assert not [line for line in said_by_doctor(monkeypatch, torch.device("cpu")) if "choice" in line]
