"""prototype_logits, balance_, TeacherTargets and weighted class_moments in Triton, against plain formulas in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F

import spcl_fast as sf

kernels = pytest.importorskip("spcl_fast.kernels", reason="Triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if DEVICE.type == "cpu" and (trouble := kernels.interpreter_trouble()):
    pytest.skip(trouble, allow_module_level=True)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_formula(x, p, tau, bias, *, normalize, variances=None, owner=None, pool="logsumexp"):
    unit = F.normalize(x, dim=1) if normalize else x
    matrices = p if p.dim() == 3 else p.expand(len(x), *p.shape)
    z = torch.einsum("bdhw,bkd->bkhw", unit, matrices) / tau
    if variances is not None:
        z = z + 0.5 * torch.einsum("bdhw,kd->bkhw", unit.square(), variances.to(x.dtype)) / tau**2
    if bias is not None:
        z = z + bias[..., None, None]
    if owner is None:
        return z
    parts = [z[:, owner == k] for k in range(int(owner.max()) + 1)]
    return torch.stack([part.logsumexp(1) if pool == "logsumexp" else part.amax(1) for part in parts], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"normalize": True}, {"normalize": False, "bias": True}, {"normalize": True, "per_image": True, "bias": True},
        {"normalize": True, "variances": True, "bias": True}, {"normalize": True, "rows": True, "pool": "max"},
        {"normalize": True, "rows": True, "pool": "logsumexp", "bias": True},
    ],
    ids=["plain", "linear", "per_image", "variances", "max", "logsumexp"],
)  # fmt: skip
def test_logits_and_their_gradients(options, dtype):
    options = dict(options)
    rows = 7
    x = rand(2, 40, 3, 5).to(dtype)
    p = F.normalize(rand(*((2, rows) if options.pop("per_image", False) else (rows,)), 40, seed=1), dim=-1)
    bias = rand(rows, seed=2) if options.pop("bias", False) else None
    variances = rand(rows, 40, seed=3).abs() if options.pop("variances", False) else None
    owner = torch.tensor([0, 2, 1, 1, 0, 2, 0]) if options.pop("rows", False) else None
    tau, pool, normalize = torch.tensor(0.4), options.pop("pool", "logsumexp"), options["normalize"]
    incoming = rand(2, rows if owner is None else 3, 3, 5, seed=4)

    def differentiated(kind):
        device = DEVICE if kind == "kernels" else "cpu"
        float_ = torch.float64 if kind == "truth" else dtype
        leaves = [x.to(float_), p if kind == "kernels" else p.to(float_), tau if kind == "kernels" else tau.to(float_)]
        leaves += [] if bias is None else [bias if kind == "kernels" else bias.to(float_)]
        leaves = [leaf.to(device).detach().clone().requires_grad_() for leaf in leaves]
        given_bias = leaves[3] if bias is not None else None
        if kind == "kernels":
            moved = (None if t is None else t.to(DEVICE) for t in (variances, owner))
            v, own = moved
            extra = {} if own is None else {"prototype_class": own, "pool": pool, "num_classes": 3}
            z = sf.prototype_logits(
                leaves[0], leaves[1], temperature=leaves[2], normalize=normalize, bias=given_bias, variances=v, backend="triton", **extra
            )  # fmt: skip
        else:
            z = logits_formula(
                *leaves[:3], given_bias, normalize=normalize, variances=variances, owner=owner, pool=pool
            )
        return [z.detach(), *torch.autograd.grad((z * incoming.to(z)).sum(), leaves)]

    for index, (g, e, t) in enumerate(zip(*map(differentiated, ("kernels", "eager", "truth")), strict=True)):
        slack = 4 * torch.finfo(dtype).eps / torch.finfo(g.dtype).eps
        oracle.assert_as_accurate(
            g.cpu(), e, t, slack=slack * (8 if index == 3 else 1)
        )  # temperature: one sum that cancels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("count", "classes"), [(40, 70), (5, 3)])
def test_balance_makes_rows_sum_to_one_and_columns_equal(count, classes, dtype):
    features, prototypes = F.normalize(rand(count, 20), dim=1).to(dtype), F.normalize(rand(classes, 20, seed=1), dim=1)
    u, v = sf.balance_(features.to(DEVICE), prototypes.to(DEVICE), temperature=0.1, iterations=3, backend="triton")
    scores = features.double() @ prototypes.to(dtype).double().T / 0.1
    want_u, want_v = torch.zeros(count, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    for _ in range(3):
        want_v = torch.tensor(count / classes).double().log() - (scores + want_u[:, None]).logsumexp(0)
        want_u = -(scores + want_v).logsumexp(1)
    torch.testing.assert_close(u.double().cpu(), want_u, rtol=1e-4, atol=2e-3 if dtype == torch.float16 else 1e-4)
    torch.testing.assert_close(v.double().cpu(), want_v, rtol=1e-4, atol=2e-3 if dtype == torch.float16 else 1e-4)
    assignment = (scores + u.double().cpu()[:, None] + v.double().cpu()).exp()
    torch.testing.assert_close(assignment.sum(1), torch.ones(count).double(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("classes", [5, 70])
def test_a_teachers_targets_are_computed_not_stored(classes):
    features, prototypes = rand(30, 33), F.normalize(rand(classes, 33, seed=1), dim=1)
    teacher, rows = rand(30, 12, seed=2), F.normalize(rand(classes, 12, seed=3), dim=1)
    u = -(teacher @ rows.T / 0.3).logsumexp(1)
    targets = sf.TeacherTargets(teacher.to(DEVICE), rows.to(DEVICE), 0.3, u.to(DEVICE))
    x, p = features.to(DEVICE).requires_grad_(), prototypes.to(DEVICE).requires_grad_()
    loss = sf.prototype_contrastive_loss(x, targets, p, temperature=0.2, backend="triton")
    got = [loss.detach(), *torch.autograd.grad(loss, (x, p))]
    exact = [t.double().requires_grad_() for t in (features, prototypes)]
    t = (teacher.double() @ rows.double().T / 0.3).softmax(1)
    truth = F.cross_entropy(F.normalize(exact[0], dim=1) @ exact[1].T / 0.2, t)
    expected = [truth.detach(), *torch.autograd.grad(truth, exact)]
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double().cpu(), e, rtol=1e-4, atol=1e-6)
