"""DINO (Caron et al., arXiv 2104.14294) and the patch loss of iBOT (Zhou et al., arXiv 2111.07832): a teacher's softmax is the target.

    t_nk = softmax over k of (<f_n, Q_k> - centre_k) / teacher temperature        f, Q of the teacher, constants
    loss_n = - sum over k of  t_nk log softmax over k of <x_n, P_k> / temperature  x, P of the student

x and f are what meets the last layer (the head's normalised bottleneck), P and Q are its weights. DINOHead.last_layer has weight_norm,
which computes `.weight` in a forward that is not called here: give weight_g * F.normalize(weight_v, dim=1). So K may be 65 536 or
262 144, and neither [N, K] map is ever there. Memory: O(N D) for rows of D, and the gradients; of DINOLoss on the CPU also the scores of
about 70 rows, 18 MB for 65 536 prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..estimators.centre import TeacherCentre
from .views import views_loss


class DINOLoss(nn.Module):
    """Mean over pairs of a teacher view q and a student view v other than q of the mean over rows of
    -sum over k of t_k log softmax over k of <v, student prototype_k> / temperature,
    t = softmax over k of (<q, teacher prototype_k> - centre_k) / teacher temperature. The centre moves after it.

    num_prototypes     K.
    temperature        of the student (0.1).
    keep               share of the old centre (0.9).
    Source: DINO, arXiv 2104.14294; `DINOLoss` of facebookresearch/dino, where a schedule gives the teacher's temperature, here the caller
    (0.04 to 0.07).
    """

    def __init__(
        self, num_prototypes: int, *, temperature: float = 0.1, keep: float = 0.9, backend: str | None = None
    ) -> None:
        super().__init__()
        self.temperature, self.backend = temperature, backend
        self.centre = TeacherCentre(num_prototypes, keep=keep)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        student_prototypes: Tensor,
        teacher_prototypes: Tensor,
        teacher_temperature: float,
    ) -> Tensor:
        """student: views of [N, D], the teacher's first; teacher: views of [N, E]; prototypes [K, D] and [K, E] -> []."""
        predicts = [[q for q in range(len(teacher)) if q != v] for v in range(len(student))]
        if not any(predicts):
            raise ValueError("DINOLoss: there is no pair of different views; give the student more than one")
        heads, v = teacher_prototypes.detach(), self.centre.potentials(teacher_temperature)
        targets = [ops.TeacherTargets(view.detach(), heads, teacher_temperature, v=v) for view in teacher]
        loss = views_loss(
            "DINOLoss", student, targets, predicts, student_prototypes, temperature=self.temperature, backend=self.backend
        )  # fmt: skip
        self.centre.update_(torch.cat([view.detach() for view in teacher]), teacher_prototypes.detach())
        return loss

    def targets(self, teacher: Tensor, prototypes: Tensor, temperature: float) -> ops.TeacherTargets:
        return centred_targets(teacher, prototypes, temperature, self.centre)


class IBOTPatchLoss(nn.Module):
    """Mean over views and images of the mean loss of an image's masked tokens; the centre moves after it, by all tokens.

    An image without a masked token counts as 0, as in the authors' code. Tokens that are not masked are computed, too, with weight 0: give
    those that are masked alone as one image of [1, N, D] with `weight` where they are selected already (DINOv2: 1 / masked of its image,
    divided by the number of images).
    Source: arXiv 2111.07832, `iBOTLoss` of bytedance/ibot (its `patch` part; the `cls` part is DINOLoss);
    `iBOTPatchLoss` of facebookresearch/dinov2.
    """

    def __init__(
        self, num_prototypes: int, *, temperature: float = 0.1, keep: float = 0.9, backend: str | None = None
    ) -> None:
        super().__init__()
        self.temperature, self.backend = temperature, backend
        self.centre = TeacherCentre(num_prototypes, keep=keep)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        masks: Sequence[Tensor],
        student_prototypes: Tensor,
        teacher_prototypes: Tensor,
        teacher_temperature: float,
        *,
        weight: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Views of student [B, T, D], teacher [B, T, E] and masks [B, T] bool; prototypes [K, D] and [K, E] -> []."""
        if not len(student) == len(teacher) == len(masks):
            raise ValueError(
                f"IBOTPatchLoss: give as many views of each, got {len(student)}, {len(teacher)} and {len(masks)}"
            )
        shares = (
            [_share_of_masked(mask, x) for x, mask in zip(student, masks, strict=True)] if weight is None else weight
        )
        rows = torch.cat([f.detach().flatten(0, 1) for f in teacher])
        loss = ops.prototype_contrastive_loss(
            torch.cat([x.flatten(0, 1) for x in student]),
            centred_targets(rows, teacher_prototypes, teacher_temperature, self.centre), student_prototypes,
            temperature=self.temperature, normalize=False, reduction="sum",
            pixel_weight=torch.cat([share.flatten() for share in shares]), backend=self.backend,
        )  # fmt: skip
        self.centre.update_(rows, teacher_prototypes.detach())
        return loss / len(student)


def centred_targets(
    features: Tensor, prototypes: Tensor, temperature: float, centre: TeacherCentre
) -> ops.TeacherTargets:
    """softmax((<f, Q> - centre) / temperature), computed where it is used; the row sums once for all losses against it."""
    found = ops.TeacherTargets(features.detach(), prototypes.detach(), temperature, v=centre.potentials(temperature))
    return found._replace(u=found.resolved().u)


def _share_of_masked(mask: Tensor, like: Tensor) -> Tensor:
    """[B, T]: 1 / masked tokens of the image / images at a masked token, 0 elsewhere."""
    masked = mask.flatten(1).to(torch.float64 if like.dtype == torch.float64 else torch.float32)
    return (masked / masked.sum(1, keepdim=True).clamp_min(1) / len(masked)).detach()
