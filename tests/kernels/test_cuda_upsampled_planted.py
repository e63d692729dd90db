"""The up-sampled ops in CUDA C++: planted bugs are seen, offsets beyond 32 bits are not cut, several groups of rows add up."""

from __future__ import annotations

import oracle
import pytest
import torch
from cuda_emulator import build
from cuda_emulator.planted import Planted
from on_backends import check, run
from problems import CROSS, problem

import spcl_fast as sf

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
OPS = ("upsampled_cross_entropy", "upsampled_prediction")

# float32 and one window shape only, which builds in a ninth of the time
QUICK = (
    ("launch.h", "case kBFloat16: return call(__nv_bfloat16{});", ""),
    ("launch.h", "default: return call(__half{});", "default: return call(float{});"),
    ("upsampled_cross_entropy.cu", "return pixels <= 3 ?", "return true ?"),
    ("upsampled_cross_entropy.cu", "if (shape.columns == 5) return launch_shape<T, 5, 5>(task, a.logits.batch, stream);", ""),
    ("upsampled_cross_entropy.cu", "return launch_shape<T, 3, 8>(task, a.logits.batch, stream);", "return Status{};"),
)  # fmt: skip
PLAN, CELL, PIXELS, LOSS = "upsampled.h", "upsampled_cell.cuh", "pixels.cuh", "upsampled_cross_entropy.cu"
# Bugs, all built into one library and taken one at a time: (file, where, what stands there, what stands there wrongly).
BUGS = {
    "wrong halo": (
        LOSS,
        "shared.first_column = {};",
        "plan.first_column(tile)",
        "plan.first_column(tile) + (tile > 0)",
    ),
    "wrong corner weight": (CELL, "const float upper = {},", "sum.all - lower", "sum.all"),
    "missing ignore": (PIXELS, "value == ignore_index) return {};", "kNoClass", "0"),
    "wrong batch offset": (LOSS, "task.dlogits + ({} * task.y", "(shared.image * task.num_classes + k)", "(k)"),
    "label's own part forgotten": (LOSS + "h", "code == k ? {} : value[j]", "-place.value(n)", "place.value(n)"),
    "a mask is not raised": (CELL, "return {}; };", "x < task.lowest ? task.lowest : x", "x"),
    "second window overwrites the first": (LOSS, "*to = {} ||", "again", "false"),
}
MISSING_BARRIER = {"missing barrier": (LOSS, "    {};\n    gather_nodes", "__syncthreads()", "(void)0")}
SEVERAL_GROUPS = {"several groups": (PLAN, "const int64_t enough = {};", "512", "1")}


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted(*OPS, bugs=BUGS | MISSING_BARRIER | SEVERAL_GROUPS, header="launch.h", replace=QUICK)


def is_right() -> None:
    """Of the cuda backend that is taken: value and gradient; and a masked class takes no part."""
    p = problem((2, 1, 4, 35), 3, (50, 74), seed=1)
    given = {"logits": p.logits, "labels": p.labels}
    check(CROSS, given, ("logits",), "cuda", slack=16)
    p = problem((1, 1, 2, 3), 4, (8, 12), seed=1)
    given = {
        "logits": p.logits.index_fill(1, torch.tensor([1]), -torch.inf),
        "labels": p.labels.where(p.labels != 1, 2),
    }
    loss, gradient = run(sf.upsampled_cross_entropy, given, ("logits",), "cuda")
    expected = run(oracle.upsampled, given | {"logits": given["logits"].clamp_min(-1e30)}, ("logits",))
    torch.testing.assert_close([loss.double(), gradient.double()], [t.double() for t in expected], rtol=1e-4, atol=1e-7)


def test_without_a_planted_bug_it_is_right(planted):
    with planted.backend.taken():
        is_right()


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(planted, bug):
    with planted.bug(bug), planted.backend.taken(), pytest.raises(AssertionError):
        is_right()


def test_a_missing_barrier_shows_in_another_order(planted):
    p = problem((1, 1, 9, 5), 3, (36, 20))

    def gradients() -> list[torch.Tensor]:
        found = []
        for order in build.ORDERS:
            with planted.backend.taken(order):
                given = {"logits": p.logits, "labels": p.labels}
                found.append(run(sf.upsampled_cross_entropy, given, ("logits",), "cuda")[1])
        return found

    right = gradients()
    assert all(torch.equal(right[0], other) for other in right[1:])
    with planted.bug("missing barrier"):
        assert any(not torch.equal(right[0], other) for other in gradients())


def test_a_block_that_walks_several_groups_of_rows_gives_the_same(planted):
    """Maps of more than 1024 blocks; here of more than two."""
    p = problem((2, 1, 40, 34), 3, (120, 70))
    with planted.bug("several groups"), planted.backend.taken():
        check(CROSS, {"logits": p.logits, "labels": p.labels}, ("logits",), "cuda", slack=16)


@pytest.mark.parametrize("backend", ["cuda"] if not torch.cuda.is_available() else [])
def test_images_more_than_2_to_the_31_elements_apart(backend):
    p = problem((2, 1, 3, 4), 3, (11, 14))
    logits, labels = p.logits, p.labels
    expected = sf.upsampled_cross_entropy(logits, labels, backend=backend)
    confidence = sf.upsampled_prediction(logits, (11, 14), backend=backend).confidence
    far_logits = (
        torch.empty(2**31 + 64).as_strided(logits.shape, (2**31, *logits.stride()[1:])).copy_(logits)
    )  # pages never touched
    memory = torch.empty(2**31 + 256, dtype=torch.uint8)
    far_labels = memory.as_strided(labels.shape, (2**31, *labels.stride()[1:])).copy_(labels)
    assert torch.equal(sf.upsampled_cross_entropy(far_logits, far_labels, backend=backend), expected)
    assert torch.equal(sf.upsampled_prediction(far_logits, (11, 14), backend=backend).confidence, confidence)
