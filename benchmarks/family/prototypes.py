"""Heads with several prototypes per class and losses against a memory: ProtoSeg, GMMSeg, ContrastiveSeg, PANet."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.family.authors import Authors, With
from benchmarks.family.case import Case, Goal, drawn, generator, gradients, unit
from benchmarks.problems import IGNORE, blocks_of_labels
from spcl_fast import losses
from spcl_fast.compat import contrastiveseg, gmmseg, mmseg, protoseg


class Settings(dict):
    """The authors' configer, as far as it is asked: get(section, name) and exists(section, name)."""

    def get(self, section: str, name: str) -> object:  # type: ignore[override]
        return self[section][name]

    def exists(self, section: str, name: str) -> bool:
        return section in self and name in self[section]


def rearrange(values: Tensor, pattern: str, **sizes: int) -> Tensor:
    """einops, as far as the authors use it, so that it need not be installed."""
    if pattern == "b c h w -> (b h w) c":
        return values.permute(0, 2, 3, 1).reshape(-1, values.shape[1])
    assert pattern == "(b h w) k -> b k h w", pattern
    return values.view(sizes["b"], sizes["h"], -1, values.shape[1]).permute(0, 3, 1, 2)


def repeat(values: Tensor, pattern: str, tile: int) -> Tensor:
    assert pattern == "n -> n tile", pattern
    return values[:, None].expand(-1, tile).contiguous()


EINOPS = {"rearrange": rearrange, "repeat": repeat}


def dense(num_classes: int, dim: int, height: int, width: int, scale: int, ignore: int, **more) -> SimpleNamespace:
    labels = blocks_of_labels(1, height, width, num_classes, generator(), torch.int64)
    labels = labels.masked_fill(labels == IGNORE, ignore)
    labels = labels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    features = drawn(1, dim, height, width).requires_grad_()
    return SimpleNamespace(features=features, labels=labels, num_classes=num_classes, dim=dim, **more)


# ---- ProtoSeg ---------------------------------------------------------------------------------------------------------

PER_CLASS = 10
PROTOSEG = Settings(
    protoseg={"loss_ppc_weight": 0.01, "loss_ppd_weight": 0.001, "use_rmi": False},
    loss={"params": {"ce_ignore_index": -1, "ce_reduction": "mean"}},
)


def _protoseg_problem(dim: int, height: int, width: int) -> SimpleNamespace:
    return dense(19, dim, height, width, 4, -1)


def _protoseg_step(net: nn.Module, forward, criterion: nn.Module, given: SimpleNamespace):
    def step():
        found = criterion(forward(given.features, given.labels[:, None]), given.labels)
        weights = {"feat_norm": net.feat_norm.weight, "mask_norm": net.mask_norm.weight}
        return gradients(found, features=given.features, **weights) | {"prototypes": net.prototypes.detach()}

    return step


def _with_prototypes(net: nn.Module, given: SimpleNamespace) -> nn.Module:
    """What the authors' constructor makes after the backbone and the heads."""
    net.gamma, net.num_prototype, net.num_classes = 0.999, PER_CLASS, given.num_classes
    net.use_prototype = net.update_prototype = True
    net.feat_norm, net.mask_norm = nn.LayerNorm(given.dim), nn.LayerNorm(given.num_classes)
    net.prototypes = nn.Parameter(0.02 * drawn(given.num_classes, PER_CLASS, given.dim, seed=1))
    return net


def _protoseg_authors(authors: Authors, given: SimpleNamespace):
    modules = "lib.models.modules"
    sinkhorn = authors.load("ProtoSeg", "lib/models/modules/sinkhorn.py")
    sinkhorn.F = With(F, gumbel_softmax=_likeliest)
    imports = {
        "lib.models.backbones.backbone_selector": None, "lib.models.tools.module_helper": None,
        f"{modules}.projection": None, f"{modules}.hanet_attention": None, f"{modules}.sinkhorn": sinkhorn,
        f"{modules}.contrast": authors.load("ProtoSeg", "lib/models/modules/contrast.py"),
        "lib.utils.tools.logger": None, "timm.models.layers": None, "einops": EINOPS,
    }  # fmt: skip
    module = authors.load("ProtoSeg", "lib/models/nets/hrnet.py", imports)
    # the features are what the projection gives: its four inputs are not up-sampled and put together here
    module.torch = With(torch, cat=lambda parts, dim: parts[0])
    module.F = With(F, interpolate=lambda x, size, mode, **more: x if mode == "bilinear" else F.interpolate(x, size))
    net = _with_prototypes(_bare(module.HRNet_W48_Proto), given)
    net.backbone, net.cls_head, net.proj_head = (lambda x: [x] * 4), nn.Identity(), nn.Identity()
    return _protoseg_step(
        net, net, _loss_module(authors, "ProtoSeg", "loss_proto").PixelPrototypeCELoss(PROTOSEG), given
    )


def _loss_module(authors: Authors, repository: str, file: str):
    unused = dict.fromkeys(("lib.utils.tools.logger", "lib.loss.rmi_loss", "lib.loss.lovasz_loss"))
    helper = authors.load(repository, "lib/loss/loss_helper.py", unused)
    return authors.load(repository, f"lib/loss/{file}.py", unused | {"lib.loss.loss_helper": helper})


def _likeliest(probabilities: Tensor, **settings) -> Tensor:
    """Both sides take the likeliest row instead of a sampled one, so that they can be compared."""
    return F.one_hot(probabilities.argmax(1), probabilities.shape[1]).to(probabilities.dtype)


def _bare(kind: type[nn.Module]) -> nn.Module:
    """Without the constructor, which builds a backbone."""
    net = kind.__new__(kind)
    nn.Module.__init__(net)
    return net


class _ProtoSegNet(protoseg.PrototypeLearning, nn.Module):
    assignment = "argmax"


def _protoseg_ours(given: SimpleNamespace):
    net = _with_prototypes(_ProtoSegNet(), given)
    return _protoseg_step(net, net.segment_by_prototypes, protoseg.PixelPrototypeCELoss(PROTOSEG), given)


# ---- GMMSeg -----------------------------------------------------------------------------------------------------------

COMPONENTS, MEMORY = 5, 500
TRAIN = {"contrast_loss": True, "contrast_loss_weight": 0.01}


def _gmmseg_problem(num_classes: int, height: int, width: int) -> SimpleNamespace:
    return dense(num_classes, 64, height, width, 4, IGNORE)


class _Head(nn.Module):
    """What the head gets from mmsegmentation: its sizes, and the cross-entropy of the up-sampled logits."""

    def __init__(self, num_classes: int, channels: int, **kwargs) -> None:
        super().__init__()
        self.num_classes, self.channels, self.norm_cfg = num_classes, channels, None

    def base_feature_transform(self, inputs: Tensor) -> Tensor:
        return inputs

    def losses(self, seg_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        up = F.interpolate(seg_logits, labels.shape[2:], mode="bilinear")
        return {"loss_ce": F.cross_entropy(up, labels[:, 0], ignore_index=IGNORE)}


def _gmmseg_head(authors: Authors):
    utils = "mmseg.utils"
    timm = {"trunc_normal_": nn.init.trunc_normal_}
    constraints = authors.load(
        "GMMSeg", "mmseg/utils/distributions/multivariate_normal_diag.py", as_module=f"{utils}.distributions.diag"
    )
    imports = {
        "mmcv.cnn": None, "mmseg.models.builder": None, "mmseg.models.decode_heads.decode_head": {"BaseDecodeHead": _Head},
        "mmseg.ops": {"resize": lambda input, size, mode: F.interpolate(input, size, mode=mode)}, "einops": EINOPS,
        "timm.models.layers": timm, f"{utils}.distributed": {"concat_all_gather_wo_grad": lambda tensor: tensor},
        f"{utils}.distributions": constraints,
        f"{utils}.GMMSeg": authors.load("GMMSeg", "mmseg/utils/GMMSeg.py", {"timm.models.layers": timm}),
    }  # fmt: skip
    kind = authors.load("GMMSeg", "mmseg/models/decode_heads/gmmseg_head.py", imports).GMMSegHead
    return type("GMMSegHead", (kind,), {"base_feature_transform": _Head.base_feature_transform})  # abstract in theirs


class _LeanHead(gmmseg.GMMSegForward, _Head):
    """Ours has mmsegmentation's loss without the resize, as the page on switching says; the buffers are those of the authors' head."""

    def __init__(self, num_classes: int, channels: int, decoder_params: dict) -> None:
        super().__init__(num_classes, channels)
        p = decoder_params
        self.num_components, self.max_sample_size = p["num_components"], p["max_sample_size"]
        self.update_GMM_interval, (self.gamma_mean, self.gamma_cov) = p["update_GMM_interval"], p["gamma"]
        count = num_classes * self.num_components
        self.register_buffer("queue", torch.empty(count, channels, p["mem_size"]))
        self.register_buffer("queue_ptr", torch.zeros(count, dtype=torch.long))
        self.means = nn.Parameter(torch.empty(num_classes, self.num_components, channels), requires_grad=False)
        self.diagonal = nn.Parameter(torch.ones_like(self.means), requires_grad=False)
        self.iteration_counter = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.feat_norm, self.mask_norm = nn.LayerNorm(channels), nn.LayerNorm(num_classes)
        self.criterion = mmseg.CrossEntropyLoss(avg_non_ignore=True)

    def losses(self, seg_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss_ce": self.criterion(seg_logits, labels[:, 0], ignore_index=IGNORE)}


def _gmmseg_step(kind: type, given: SimpleNamespace):
    params = {
        "embed_dim": given.dim, "num_components": COMPONENTS, "update_GMM_interval": 5, "gamma": (0.999, 0.0),
        "factor_n": 2, "factor_c": 1, "factor_p": 1, "mem_size": MEMORY, "max_sample_size": 20,
    }  # fmt: skip
    head = kind(num_classes=given.num_classes, channels=given.dim, decoder_params=params)
    head.means.data.copy_(0.02 * drawn(*head.means.shape, seed=1))
    head.queue.copy_(F.normalize(drawn(*head.queue.shape, seed=2), dim=1))
    labels = given.labels[:, None]

    def step():
        found = head.forward_train(given.features, None, labels, TRAIN)
        weights = {"feat_norm": head.feat_norm.weight, "mask_norm": head.mask_norm.weight}
        state = {"means": head.means.detach(), "diagonal": head.diagonal.detach()}
        return gradients(found["loss_ce"] + found["loss_contrast"], features=given.features, **weights) | state

    return step


# ---- ContrastiveSeg ---------------------------------------------------------------------------------------------------

CONTRAST = Settings(
    contrast={"temperature": 0.1, "base_temperature": 0.07, "max_samples": 1024, "max_views": 50, "loss_weight": 0.1},
    loss={"params": {"ce_ignore_index": -1}},
)  # fmt: skip


def _contrast_problem(dim: int, height: int, width: int, memory: int) -> SimpleNamespace:
    given = dense(19, dim, height, width, 4, -1)
    # every class in vertical stripes: each has pixels enough for its 50 anchors
    stripes = (torch.arange(given.labels.shape[2]) * 19 // given.labels.shape[2]).expand(given.labels.shape)
    given.labels = stripes.clone()
    given.features = F.normalize(given.features.detach(), dim=1).requires_grad_()
    given.predicted = torch.randint(0, 19, (1, height, width), generator=generator(1))
    of_pixel = F.interpolate(given.labels[:, None].float(), (height, width)).long()[:, 0]
    right = torch.rand(of_pixel.shape, generator=generator(2)) < 0.5
    given.predicted = torch.where(right, of_pixel, given.predicted)
    given.queues = unit(19, memory, dim, seed=3), unit(19, memory, dim, seed=4)
    return given


def _contrast_step(criterion: nn.Module, queue, given: SimpleNamespace):
    def step():
        torch.manual_seed(0)  # the same anchors
        loss = criterion(given.features, given.labels, given.predicted, queue())
        return gradients(loss, features=given.features)

    return step


def _contrast_authors(authors: Authors, given: SimpleNamespace):
    module = _loss_module(authors, "ContrastiveSeg", "loss_contrast_mem")
    # their loss concatenates the two queues before it is called
    return _contrast_step(module.PixelContrastLoss(CONTRAST), lambda: torch.cat(given.queues, 1), given)


def _contrast_ours(given: SimpleNamespace):
    return _contrast_step(contrastiveseg.PixelContrastLoss(CONTRAST), lambda: given.queues, given)


# ---- PANet ------------------------------------------------------------------------------------------------------------


def _panet_problem(dim: int, size: int, image: int) -> SimpleNamespace:
    """One way, one shot; the foreground is a rectangle, and so is that of the query."""
    fore = torch.zeros(1, image, image)
    fore[:, image // 4 : image // 2, image // 4 : 3 * image // 4] = 1
    features = drawn(2, dim, size, size)
    inside = F.interpolate(fore[None], (size, size))[0, 0]
    features = features + inside * drawn(dim, 1, 1, seed=1)
    return SimpleNamespace(features=features.requires_grad_(), fore=fore, back=1 - fore, labels=fore.long())


def _panet_authors(authors: Authors, given: SimpleNamespace):
    net = _bare(authors.load("PANet", "models/fewshot.py", {"models.vgg": None}, as_module="models.fewshot").FewShotSeg)
    net.config, net.encoder = {"align": True}, lambda images: given.features
    image = torch.empty(1, 3, *given.fore.shape[1:])

    def step():
        predicted, aligned = net([[image]], [[given.fore]], [[given.back]], [image])
        loss = F.cross_entropy(predicted, given.labels, ignore_index=IGNORE) + aligned
        return gradients(loss, features=given.features)

    return step


def _panet_ours(given: SimpleNamespace):
    def step():
        support, query = given.features[None, :1], given.features[1:]
        masks = given.fore[None], given.back[None]
        logits = losses.panet_logits(query, losses.panet_prototypes(support, *masks))
        loss = losses.panet_loss(logits, given.labels) + losses.panet_alignment_loss(query, logits, support, *masks)
        return gradients(loss, features=given.features)

    return step


CASES = (
    Case(
        "protoseg", "ProtoSeg", "ProtoSeg, head and losses: K 19, M 10, D 720, 128x256 to 512x1024",
        {"dim": 720, "height": 128, "width": 256}, {"dim": 24, "height": 16, "width": 24}, _protoseg_problem,
        _protoseg_authors, _protoseg_ours, theirs_gb=2.0,
    ),
    Case(
        "gmmseg", "GMMSeg", "GMMSeg, head and losses: K 150, M 5, D 64, 64x64 to 256x256",
        {"num_classes": 150, "height": 64, "width": 64}, {"num_classes": 5, "height": 16, "width": 16}, _gmmseg_problem,
        lambda authors, given: _gmmseg_step(_gmmseg_head(authors), given), lambda given: _gmmseg_step(_LeanHead, given),
        Goal(1, 20, either=False), 1e-2, theirs_gb=4.0,  # two components that tie to the last bit: either may get the gradient
    ),
    Case(
        "contrastiveseg", "ContrastiveSeg", "ContrastiveSeg, InfoNCE: 950 anchors, bank of 50 008 rows, D 256",
        {"dim": 256, "height": 128, "width": 256, "memory": 1316}, {"dim": 16, "height": 64, "width": 64, "memory": 60},
        _contrast_problem, _contrast_authors, _contrast_ours, Goal(1, 5, either=False), theirs_gb=2.5,
    ),
    Case(
        "panet", "PANet", "PANet, one way, one shot: D 512, 53x53 to 417x417",
        {"dim": 512, "size": 53, "image": 417}, {"dim": 8, "size": 9, "image": 64}, _panet_problem, _panet_authors,
        _panet_ours,
    ),
)  # fmt: skip
