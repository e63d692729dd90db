"""Write a trained net as one file for other programs, and keep it only where it predicts what the net does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import ConfigError, DataError, NumericError
from ..runs.layout import ONNX, TORCH
from ..runs.output import make_folder_of
from .domains import Domains
from .exported import KEY, Exported, Facts, load_exported, quiet
from .trained import load_trained

if TYPE_CHECKING:
    from ..models import SegmentationModel

# beyond rounding, and what rounding in another order may do where two classes are as good
_LOGITS, _SAME_LABELS = 1e-3, 0.999


class _Logits(nn.Module):
    """images -> logits, of a net that gives features, too."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[1].float()


def export_trained(
    path: Path, config: Config, stage: str | None, output: Path, *, images: int = 4, say: Callable[[str], None] = print
) -> None:
    """Write `output` (.onnx or .pt2) and compare it with the net on `images` of the target's validation images before it gets its name.

    Raises ModuleNotFoundError without the packages of the extra `onnx`, DataError where there is no image, NumericError where they differ.
    """
    trained = load_trained(path, config, stage)
    if isinstance(trained.model, Exported):
        raise ConfigError(f"{path} is an exported net. Export the run that it is from.")
    model, classes = trained.model.cpu(), trained.classes
    facts = Facts(
        model.name, model.stride, config.target.eval_size, classes.names, classes.palette, classes.ignore_index
    )
    seen = _real_images(config, images)
    make_folder_of(output, say)
    half = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    try:
        with quiet():
            (_write_onnx if output.suffix == ONNX else _write_torch)(_Logits(model).eval(), seen[0], half, facts)
        worst, same = _compare(model, load_exported(half)[0], seen, output)
        if worst > _LOGITS or same < _SAME_LABELS:
            raise NumericError(
                f"{output} is not written: on {len(seen)} images its logits differ from the net's by up to {worst:.1e} of the largest, "
                f"and {same:.2%} of the labels agree; expected {_LOGITS:.0e} and {_SAME_LABELS:.1%}. Try {_other(output)}."
            )
        half.replace(output)
    finally:
        half.unlink(missing_ok=True)
    say(
        f"{output}: {output.stat().st_size / 2**20:.1f} MiB from {trained.weights}; on {len(seen)} images logits differ by up to "
        f"{worst:.1e} of the largest, and {same:.3%} of the labels agree"
    )


def _other(output: Path) -> Path:
    return output.with_suffix(TORCH if output.suffix == ONNX else ONNX)


def _real_images(config: Config, count: int) -> list[Tensor]:
    """Validation images of the target as the net sees them, and a part of the last one with odd sides, where a net pads otherwise."""
    from ..train.evaluate import eval_batches

    dataset = Domains(config).evaluated(labels=False).spread(count)
    seen = [image for image, _, _ in eval_batches(dataset, config.target.eval_size, labels=False)]
    if not seen:
        raise DataError(f"{config.target.val_split}: no image of the target to compare the exported net on")
    height, width = seen[-1].shape[2:]
    return [*seen, seen[-1][:, :, : height * 3 // 8 * 2 - 1, : width // 3 * 2 - 1]]


@torch.inference_mode()
def _compare(model: SegmentationModel, exported: Exported, seen: list[Tensor], output: Path) -> tuple[float, float]:
    """The largest difference of two logits over the largest logit, and the share of equal labels of the grid."""
    worst, same, total = 0.0, 0, 0
    for images in seen:
        ours = model(images)[1].float()
        try:
            theirs = exported(images)[1]
        except AssertionError as error:  # a size for which torch.export found the net to do something else
            height, width = images.shape[2:]
            raise NumericError(
                f"{output} is not written: exported, the net does not take images of {width}x{height} ({error}). "
                f"Give larger ones (--target.eval_size), or try {_other(output)}."
            ) from error
        if ours.shape != theirs.shape:
            return float("inf"), 0.0
        worst = max(worst, ((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12)).item())
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        total += ours[:, 0].numel()
    return worst, same / total


# ---- writing ------------------------------------------------------------------------------------------------------------


def _sizes() -> dict[int, Any]:
    return {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}


def _example(images: Tensor) -> Tensor:
    """Two images: a batch of one would be exported as always one."""
    return images[:1].repeat(2, 1, 1, 1)


def _write_torch(net: nn.Module, images: Tensor, path: Path, facts: Facts) -> None:
    program = torch.export.export(net, (_example(images),), dynamic_shapes={"images": _sizes()})
    torch.export.save(program, path, extra_files={KEY: facts.as_text()})


def _write_onnx(net: nn.Module, images: Tensor, path: Path, facts: Facts) -> None:
    import onnx  # pyright: ignore[reportMissingImports]
    import onnxruntime  # noqa: F401  # pyright: ignore[reportMissingImports]  compares it afterwards
    import onnxscript  # noqa: F401  # pyright: ignore[reportMissingImports]  torch's exporter needs it

    torch.onnx.export(
        net, (_example(images),), path, input_names=["images"], output_names=["logits"], dynamo=True, external_data=False,
        dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}}, verbose=False,
    )  # fmt: skip
    model = onnx.load(path)
    model.metadata_props.add(key=KEY, value=facts.as_text())
    onnx.save(model, path)
