"""A stand-in for timm 1.0: a pyramid net with a BatchNorm subclass and a ViT, behind create_model, is_model and list_models."""

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's BatchNorm has the activation in it: another class in its place would lose that."""

    def forward(self, x):
        return F.relu(super().forward(x))


class _Info:
    def __init__(self, out_indices, strides, channels):
        self.out_indices, self._strides, self._channels = out_indices, strides, channels

    def reduction(self):
        return self._strides

    def channels(self):
        return self._channels


class Pyramid(nn.ModuleDict):
    """As timm's FeatureListNet: maps of stride 2, 4, 8, 16; what lies after the last one asked for is not built."""

    def __init__(self, out_indices=(0, 1, 2, 3)):
        super().__init__()
        widths = (4, 6, 8, 12)
        self.out_indices, inputs = tuple(out_indices), 3
        for index in range(max(out_indices) + 1):
            conv = nn.Conv2d(inputs, widths[index], 3, 2, 1, bias=False)
            self[f"stage{index}"] = nn.Sequential(conv, BatchNormAct2d(widths[index]))
            inputs = widths[index]
        self.feature_info = _Info(self.out_indices, [2 << i for i in out_indices], [widths[i] for i in out_indices])

    def forward(self, x):
        maps = []
        for index, stage in enumerate(self.values()):
            x = stage(x)
            if index in self.out_indices:
                maps.append(x)
        return maps


class Block(nn.Module):
    def __init__(self, dim, drop):
        super().__init__()
        self.norm, self.mlp, self.drop = nn.LayerNorm(dim), nn.Linear(dim, dim), drop

    def forward(self, x):
        return x + F.dropout(self.mlp(self.norm(x)), self.drop, self.training)


class ViT(nn.Module):
    """Patches of 7 pixels; it drops what is left of an image, as timm's does, unless the image is of whole patches."""

    patch, dim = 7, 8

    def __init__(self, dynamic_img_size=False):
        super().__init__()
        assert dynamic_img_size, "images of any size were not asked for"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.patch_embed = nn.Conv2d(3, self.dim, self.patch, self.patch)
        rates = [
            x.item() for x in torch.linspace(0, 0.1, 3, device="cpu")
        ]  # as timm does: not possible with fake tensors
        self.blocks = nn.Sequential(*(Block(self.dim, rate) for rate in rates))
        self.norm = nn.LayerNorm(self.dim)
        self.head = nn.Linear(self.dim, 5)

    def prune_intermediate_layers(self, indices, prune_norm=False, prune_head=True):
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.head = nn.Identity()

    def forward_intermediates(self, x, indices, norm, output_fmt, intermediates_only):
        assert (indices, output_fmt, intermediates_only) == (1, "NCHW", True)
        assert not any(side % self.patch for side in x.shape[2:]) or torch.compiler.is_exporting()
        x = self.patch_embed(x)
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = self.blocks(x)
        x = (self.norm(x) if norm else x)[:, 1:]
        return [x.transpose(1, 2).reshape(x.shape[0], -1, height, width)]


NETS = {"small_cnn": Pyramid, "small_vit": ViT, "no_maps": None}


def is_model(name):
    return name in NETS


def list_models():
    return list(NETS)


def create_model(name, pretrained=False, features_only=False, out_indices=None, **options):
    if pretrained == "never" or (pretrained and name == "small_vit"):
        raise FileNotFoundError("no network here\nand a second line")
    if NETS[name] is None and features_only:
        raise RuntimeError("features_only not implemented for no_maps.")
    if NETS[name] is Pyramid:
        if options:
            raise TypeError(f"Pyramid.__init__() got an unexpected keyword argument {next(iter(options))!r}")
        net = Pyramid(*([out_indices] if out_indices else []))
    else:
        net = ViT(**options)
        if features_only:
            net.feature_info = _Info((0, 1, 2), [7] * 3, [8] * 3)
    if pretrained:
        for parameter in net.parameters():
            nn.init.constant_(parameter, 0.125)
    net.pretrained_cfg = dict(CONFIG)
    return net
