"""DINO, iBOT, SwAV and CAPI against their formulas with every [N, K] map there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transcription import TEMPERATURES, assert_equals

from spcl_fast.estimators import TeacherCentre
from spcl_fast.losses import CAPIClustering, DINOLoss, IBOTPatchLoss, SwAVLoss, capi_loss

N, D, E, K = 12, 8, 6, 20


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(drawn(*shape, seed=seed), dim=-1)


def cross_entropy(target, logits):
    return -(target * logits.log_softmax(-1)).sum(-1)


def sinkhorn(scores, iterations=3):
    """[N, K] float64: columns, then rows, `iterations` times."""
    plan = (scores - scores.max()).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(0, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan


# ---- the centre ------------------------------------------------------------------------------------------------------


def test_the_centre_is_the_running_mean_of_the_logits():
    centre, expected, heads = TeacherCentre(K, keep=0.7), torch.zeros(K), unit(K, E, seed=1)
    for seed in range(3):
        f = drawn(N, E, seed=seed)
        expected = 0.7 * expected + 0.3 * (f @ heads.T).mean(0)
        assert centre.update_(f, heads) is centre
    torch.testing.assert_close(centre.centre, expected)
    torch.testing.assert_close(centre.potentials(0.04), -expected / 0.04)
    assert (
        torch.equal(centre.half().centre, centre.update_(f[:0], heads).centre) and centre.centre.dtype == torch.float32
    )
    with pytest.raises(ValueError, match=r"prototypes \[20, E\], got \[12, 6\] and \[19, 6\]"):
        centre.update_(f, heads[1:])
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\], got 2"):
        TeacherCentre(K, keep=2)


def test_parts_of_the_prototypes_do_not_change_the_centre(monkeypatch):
    whole, parts, f, heads = TeacherCentre(K), TeacherCentre(K), drawn(N, E), unit(K, E, seed=1)
    whole.update_(f, heads)
    monkeypatch.setattr("spcl_fast.estimators.centre._BLOCK", 3 * E)
    torch.testing.assert_close(parts.update_(f, heads).centre, whole.centre, rtol=1e-6, atol=0)


# ---- DINO and iBOT ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["whole", "parts", "pairs"])
def way(request, monkeypatch):
    """The backend of a loss of many views: in one block, in blocks of few images and classes, or pair by pair through the op."""
    if request.param == "parts":
        for name, value in {"_ROWS": 15, "SCORES": 1, "_AT_ONCE": 1, "_PROTOTYPES": 7, "_CLASSES": 6}.items():
            monkeypatch.setattr(f"spcl_fast.losses.views.{name}", value)
    return "reference" if request.param == "pairs" else None


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dino_is_the_mean_over_pairs_of_different_views(temperature, way):
    teacher, heads, start = [unit(N, E, seed=s) for s in (1, 2)], unit(K, E, seed=3), drawn(K, seed=4)
    centre_of = lambda dtype: start.to(dtype)  # noqa: E731

    def ours(a, b, c, p):
        loss = DINOLoss(K, temperature=temperature, backend=way)
        loss.centre.centre = centre_of(a.dtype)
        return loss([a, b, c], [t.to(a.dtype) for t in teacher], p, heads.to(a.dtype), 0.07)

    def plain(a, b, c, p):
        targets = [((t.to(a.dtype) @ heads.to(a.dtype).T - centre_of(a.dtype)) / 0.07).softmax(-1) for t in teacher]
        pairs = [(q, v) for q in range(2) for v in range(3) if q != v]
        return sum(cross_entropy(targets[q], (a, b, c)[v] @ p.T / temperature).mean() for q, v in pairs) / len(pairs)

    views = {name: unit(N, D, seed=s) for name, s in (("a", 5), ("b", 6), ("c", 7))}
    assert_equals(ours, plain, **views, p=unit(K, D, seed=8), slack=64)


def test_the_centre_of_dino_moves_after_its_loss_by_all_teacher_views():
    loss, teacher, heads = DINOLoss(K, keep=0.5), [unit(N, E, seed=s) for s in (1, 2)], unit(K, E, seed=3)
    given = [unit(N, D, seed=s) for s in (5, 6)], teacher, unit(K, D, seed=8), heads, 0.07
    first, again = loss(*given), loss(*given)
    assert first != again  # the second is centred
    mean = (torch.cat(teacher) @ heads.T).mean(0)
    torch.testing.assert_close(loss.centre.centre, 0.75 * mean)
    with pytest.raises(ValueError, match="no pair of different views"):
        loss(given[0][:1], teacher[:1], *given[2:])


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ibot_is_the_mean_over_images_of_the_mean_over_masked_tokens(temperature):
    images, tokens = 3, 5
    teacher, heads, start = [unit(images, tokens, E, seed=s) for s in (1, 2)], unit(K, E, seed=3), drawn(K, seed=4)
    masks = [drawn(images, tokens, seed=s) > 0 for s in (10, 11)]
    masks[0][1] = False  # an image without any

    def ours(a, b, p):
        loss = IBOTPatchLoss(K, temperature=temperature)
        loss.centre.centre = start.to(a.dtype)
        return loss([a, b], [t.to(a.dtype) for t in teacher], masks, p, heads.to(a.dtype), 0.07)

    def plain(a, b, p):
        total = 0
        for x, t, mask in zip((a, b), teacher, masks, strict=True):
            target = ((t.to(a.dtype) @ heads.to(a.dtype).T - start.to(a.dtype)) / 0.07).softmax(-1)
            loss = cross_entropy(target, x @ p.T / temperature) * mask
            total = total + (loss.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
        return total / 2

    views = {name: unit(images, tokens, D, seed=s) for name, s in (("a", 5), ("b", 6))}
    assert_equals(ours, plain, **views, p=unit(K, D, seed=8), slack=64)


def test_ibot_takes_selected_tokens_with_their_weights():
    x, f, heads, p = unit(3, 5, D, seed=1), unit(3, 5, E, seed=2), unit(K, E, seed=3), unit(K, D, seed=4)
    mask = drawn(3, 5, seed=9) > 0
    mask[:, 0] = True
    whole = IBOTPatchLoss(K)([x], [f], [mask], p, heads, 0.07)
    weight = (mask / mask.sum(1, keepdim=True) / 3)[mask][None]
    one = torch.ones_like(weight, dtype=torch.bool)
    chosen = IBOTPatchLoss(K)([x[mask][None]], [f[mask][None]], [one], p, heads, 0.07, weight=[weight])
    torch.testing.assert_close(chosen, whole)
    with pytest.raises(ValueError, match="as many views of each, got 1, 1 and 2"):
        IBOTPatchLoss(K)([x], [f], [mask, mask], p, heads, 0.07)


# ---- many views ------------------------------------------------------------------------------------------------------


def views_and_prototypes(dtype=torch.float32):
    """Leaves: three views and the prototypes; and the loss of DINO of them."""
    leaves = [unit(N, D, seed=s).to(dtype).requires_grad_() for s in (5, 6, 7)]
    leaves.append(unit(K, D, seed=8).to(dtype).requires_grad_())
    teacher, heads = [unit(N, E, seed=s).to(dtype) for s in (1, 2)], unit(K, E, seed=3).to(dtype)
    return leaves, lambda *given: DINOLoss(K)(given[:3], teacher, given[3], heads, 0.07)


def test_a_second_backward_has_the_same_gradients_and_the_first_keeps_its_own():
    leaves, loss = views_and_prototypes()
    found = loss(*leaves)
    first = torch.autograd.grad(found, leaves, 3 * torch.ones(()), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(found, leaves)
    for one, other, copy in zip(first, second, kept, strict=True):
        torch.testing.assert_close(one, 3 * other)
        assert torch.equal(one, copy) and one.norm() > 0
    with pytest.raises(RuntimeError, match="second time"):
        found.backward()


def test_gradients_are_formed_where_they_are_wanted_alone():
    leaves, loss = views_and_prototypes()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for wanted in ([0, 2], [3], [1, 3]):
        given = [leaf if place in wanted else leaf.detach() for place, leaf in enumerate(leaves)]
        found = torch.autograd.grad(loss(*given), [leaves[place] for place in wanted])
        for place, gradient in zip(wanted, found, strict=True):
            torch.testing.assert_close(gradient, expected[place])
    assert not loss(*[leaf.detach() for leaf in leaves]).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(loss(*leaves), loss(*leaves))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_views_of_half_floats_are_compared_in_float32_and_survive_a_scaler(dtype):
    leaves, loss = views_and_prototypes(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    teacher, heads = [unit(N, E, seed=s).to(dtype).double() for s in (1, 2)], unit(K, E, seed=3).to(dtype).double()
    expected = DINOLoss(K)(exact[:3], teacher, exact[3], heads, 0.07)
    found = loss(*leaves)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    small = 2.0**-20  # as many images would make it: below what float16 has
    gradients = torch.autograd.grad(found * small * 2.0**20, leaves)
    for one, other in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_view_that_predicts_nothing_has_no_gradient():
    leaves, _ = views_and_prototypes()
    crops, prototypes = leaves[:3], leaves[3]
    SwAVLoss(crops_for_assign=(0,))(crops, prototypes).backward()
    assert crops[0].grad is None and crops[1].grad.norm() > 0 and prototypes.grad.norm() > 0


def test_views_that_do_not_fit_are_refused():
    teacher, heads, p = [unit(N, E, seed=1)], unit(K, E, seed=3), unit(K, D, seed=8)
    for students, given, of, reason in (
        ([unit(N, D), unit(N - 1, D)], p, heads, "every view must have as many rows"),
        ([unit(N, D), unit(N, D + 1)], p, heads, r"got \[20, 8\] for a view \[12, 9\]"),
        (
            [unit(N, D)] * 2,
            p,
            heads[1:],
            "as many prototypes of the teacher as of the student, at least 1, got 19 and 20",
        ),
        ([unit(N, D)] * 2, p[0], heads, r"prototypes must be \[K, D\], got shape \[8\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            DINOLoss(K)(students, teacher, given, of, 0.07)
    with pytest.raises(ValueError, match="temperature must be finite and above 0, got 0"):
        DINOLoss(K)([unit(N, D)] * 2, teacher, p, heads, 0)


def test_no_image_is_a_loss_of_0():
    leaves, loss = views_and_prototypes()
    none = [leaf.detach()[:0].requires_grad_() for leaf in leaves[:3]]
    prototypes = leaves[3]
    found = SwAVLoss()(none, prototypes)
    found.backward()
    assert found == 0 and prototypes.grad.count_nonzero() == 0 and none[0].grad.shape == (0, D)


# ---- SwAV ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_queue", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_swav_swaps_balanced_assignments(temperature, with_queue, way):
    queues = [unit(7, D, seed=s) for s in (21, 22)] if with_queue else None

    def ours(a, b, c, p):
        given = None if queues is None else [q.to(a.dtype) for q in queues]
        return SwAVLoss(temperature=temperature, backend=way)([a, b, c], p, given)

    def plain(a, b, c, p):
        total = 0
        for i, assigned in enumerate((a, b)):
            rows = assigned.detach() if queues is None else torch.cat([queues[i].to(a.dtype), assigned.detach()])
            target = sinkhorn(rows @ p.detach().T / 0.05)[-N:]
            others = [x for v, x in enumerate((a, b, c)) if v != i]
            total = total + sum(cross_entropy(target, x @ p.T / temperature).mean() for x in others) / 2
        return total / 2

    crops = {name: unit(N, D, seed=s) for name, s in (("a", 5), ("b", 6), ("c", 7))}
    assert_equals(ours, plain, **crops, p=unit(K, D, seed=8), slack=256)


def test_swav_says_which_crop_is_missing():
    with pytest.raises(ValueError, match=r"2 crops, but \[0, 2\] are to be assigned"):
        SwAVLoss(crops_for_assign=(0, 2))([unit(N, D), unit(N, D)], unit(K, D))
    with pytest.raises(ValueError, match="at least one crop"):
        SwAVLoss(crops_for_assign=())


# ---- CAPI ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positionwise", [True, False])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_capi_clusters_are_balanced_at_each_position_and_predicted(temperature, positionwise):
    positions, batch = 3, 9

    def ours(x, weight, bias):
        head = CAPIClustering(D, K, prediction_temperature=temperature, positionwise=positionwise).to(x.dtype)
        return torch.func.functional_call(head, {"layer.weight": weight, "layer.bias": bias}, (x,))[1]

    def plain(x, weight, bias):
        logits = F.normalize(x, dim=-1) @ weight.T + bias
        scores = logits.detach() / 0.06
        target = torch.stack([sinkhorn(s) for s in scores]) if positionwise else sinkhorn(scores.flatten(0, 1))
        return cross_entropy(target.flatten(0, -2), logits.flatten(0, 1) / temperature).mean()

    leaves = {"x": drawn(positions, batch, D, seed=5), "weight": drawn(K, D, seed=6) / 4, "bias": drawn(K, seed=7)}
    assert_equals(ours, plain, **leaves, slack=512)


def test_a_student_is_trained_against_the_targets_of_the_clustering():
    head, x, y, p = CAPIClustering(D, K), drawn(3, 9, D, seed=5), drawn(27, 4, seed=6), drawn(K, 4, seed=7)
    targets, _ = head(x)
    scores = (F.normalize(x, dim=-1) @ head.layer.weight.T).detach().double() / 0.06
    expected = cross_entropy(
        torch.stack([sinkhorn(s) for s in scores]).flatten(0, 1), F.normalize(y, dim=1).double() @ p.double().T / 0.12
    )
    torch.testing.assert_close(capi_loss(y, targets, p).double(), expected.mean(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"x must be \[positions, batch, 8\], got shape \[27, 4\]"):
        head(y)


@pytest.mark.parametrize("made", [lambda: CAPIClustering(D, K), lambda: SwAVLoss()])
def test_targets_under_autocast_are_those_without(made):
    criterion, x = made(), unit(3, 9, D, seed=5)
    given = (x,) if isinstance(criterion, CAPIClustering) else (x[0], unit(K, D, seed=6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = criterion.targets(*given)
    expected = criterion.targets(*given)
    assert torch.equal(found.u, expected.u)
