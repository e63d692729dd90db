"""Reads the weights people already have into a net: says which format it found, and names every key that is too much or too little.

Nothing in a file is ever run: `.npz` without pickles, safetensors, and `torch.load(weights_only=True)` for the rest.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from . import lite
from .base import SegmentationModel

State = dict[str, Tensor]
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}  # of parallel, compiled and other shells
READABLE = (
    "torchvision's ResNet or VGG16 state dict, a released SPCL checkpoint (feature_extractor, classifier), "
    "an EfficientNet-Lite0, Lite1 or Lite2 encoder (.npz or .pth), or weights saved by spcl_fast (.safetensors)"
)


@dataclass(frozen=True)
class LoadedWeights:
    """What `load_weights` did."""

    format: str  # for the reader
    loaded: tuple[str, ...]  # keys of the model that were read
    fresh: tuple[str, ...]  # keys of the model the format does not hold; they keep their values
    unused: tuple[str, ...]  # keys of the file this net has no place for, by design (ImageNet classifiers)


@dataclass(frozen=True)
class _Found:
    """A file's tensors under this package's names."""

    format: str
    state: State
    unused: tuple[str, ...] = ()
    covers: tuple[str, ...] = ("",)  # prefixes of the model's keys that this format must fill
    leaves: tuple[str, ...] = ()  # prefixes inside those that it does not have


def load_weights(
    model: SegmentationModel, path: str | Path, *, body_only: bool = False, trained: bool = False
) -> LoadedWeights:
    """Copy the weights of a file into `model`; all of them or, on any error, none.

    body_only: the classifier keeps its values and the file's is not read: for weights of a net with other classes.
    trained: the net is to be used as it is, so that there is no advice to leave out its classifier.

    Reads torchvision state dicts (ResNet, VGG16), released SPCL checkpoints (with or without "module."), the EfficientNet-Lite0 encoder
    and our own safetensors (a file, or a folder that holds one). Raises ConfigError for a path without a file and for weights of another
    net, CheckpointError for a file that cannot be read safely or lacks keys. Memory: one copy of the file.
    """
    path = Path(path)
    found = _recognise(_read(path), path)
    if body_only:
        found = _without_classifier(found)
    expected = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
    named = {_bare(key): key for key in expected}  # a net may have a part called "module" itself
    found = dataclasses.replace(found, state={named.get(key, key): value for key, value in found.state.items()})
    wanted = {
        key for key in expected if key.startswith(found.covers) and not (found.leaves and key.startswith(found.leaves))
    }
    if body_only:
        wanted = {key for key in wanted if not key.startswith(_CLASSIFIER)}
    if not any(key in wanted for key in found.state):
        raise ConfigError(
            f"{path} holds {found.format}, and the net is {model.name}: not one key fits. Change model.name or model.weights."
        )
    _check(model, found, wanted, path, trained)
    model.load_state_dict(found.state, strict=False)
    return LoadedWeights(found.format, tuple(sorted(wanted)), tuple(sorted(expected - wanted)), found.unused)


_CLASSIFIER = "classifier."


def _without_classifier(found: _Found) -> _Found:
    unread = sorted(key for key in found.state if key.startswith(_CLASSIFIER))
    state = {key: value for key, value in found.state.items() if key not in unread}
    return dataclasses.replace(found, state=state, unused=tuple(sorted({*found.unused, *unread})))


def _check(model: SegmentationModel, found: _Found, wanted: set[str], path: Path, trained: bool) -> None:
    missing, unexpected = sorted(wanted - found.state.keys()), sorted(found.state.keys() - wanted)
    own = model.state_dict()
    shapes = [
        f"{key}: file {list(found.state[key].shape)}, net {list(own[key].shape)}"
        for key in sorted(wanted & found.state.keys())
        if found.state[key].shape != own[key].shape
    ]
    odd = [key for key in sorted(wanted & found.state.keys()) if not _has_values(found.state[key], own[key])]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''}"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of no such values", odd),
        )
        if keys
    ]
    if problems:
        others = [*missing, *unexpected, *shapes, *odd]
        if trained and others == missing:
            raise CheckpointError(
                f"{path} looks like {found.format}, but not like all of it: {'; '.join(problems)}. Nothing was loaded; give a file "
                "with the whole net, such as a checkpoint folder of a run or what torch.save makes of the net's state_dict()."
            )
        if others and all(key.startswith(_CLASSIFIER) for key in others):
            raise CheckpointError(
                f"{path} looks like {found.format}, whose classifier does not fit {model.num_classes} classes: {'; '.join(problems)}. "
                "Nothing was loaded; "
                + (
                    "give the classes that it was trained with (--target.classes, --target.num_classes)."
                    if trained
                    else "check the number of classes. To start from all but the classifier, pass --model.body_only."
                )
            )
        raise CheckpointError(
            f"{path} looks like {found.format} but does not fit {model.name} with {model.num_classes} classes: {'; '.join(problems)}. "
            "Nothing was loaded; check model.name, the number of classes and model.feature_dim."
        )


def _has_values(given: Tensor, own: Tensor) -> bool:
    """Whether a file's tensor can be copied: not integers for numbers, and neither sparse nor without data."""
    return given.layout == torch.strided and not given.is_meta and given.is_floating_point() == own.is_floating_point()


def _read(path: Path) -> dict[str, Any]:
    """The file as a dictionary of tensors (or of dictionaries of tensors), without running anything in it."""
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        named = [file for file in inside if file.stem == "model"] or inside
        if len(named) != 1:
            raise ConfigError(
                f"{path} is a folder with {len(inside)} safetensors files: name the file, or a folder with one model.safetensors."
            )
        path = named[0]
    if not path.is_file():
        raise ConfigError(
            f"model weights: there is no file {path}. Give {READABLE}; or leave model.weights empty to start from random weights."
        )
    said: list[warnings.WarningMessage] = []  # torch names the pickle protocol in a warning alone
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ConfigError(f"reading {path} needs 'safetensors': pip install \"spcl_fast[train]\"") from error
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
        if any(start.startswith(begin) for begin, _ in _NO_WEIGHTS):
            raise CheckpointError(f"{path} cannot be read: {_why_unread(path, error)}.") from error
        raise CheckpointError(
            _more_than_tensors(path, "\n".join([str(error), *(str(one.message) for one in said)]))
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # readers of damaged files raise anything
        raise CheckpointError(f"{path} cannot be read: {_why_unread(path, error)}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a dictionary of tensors. We read {READABLE}."
        )
    return content


def _more_than_tensors(path: Path, refusal: str) -> str:
    """Why torch did not unpickle a file, in our words: its own advise to run whatever is in it."""
    refusal = _ESCAPES.sub("", refusal)
    protocol, asked = re.search(r"pickle protocol (\d+)", refusal), re.findall(r"GLOBAL ([\w.]+)", refusal)
    if protocol is not None:
        what = f"is saved with pickle protocol {protocol[1]}, and only protocol 2 is read, torch.save's default"
    elif asked:
        what = f"holds more than tensors ({', '.join(dict.fromkeys(asked))}) and was not run"
    else:
        what = "holds more than tensors, or is damaged, and was not run"
    return (
        f"{path} {what}. Save the tensors alone, in the program that wrote it:\n"
        '    state = {key: value for key, value in model.state_dict().items()}\n    torch.save(state, "weights.pth")'
    )


# how a file begins that is something else: who fetched it by the wrong address gets one of these
_NO_WEIGHTS = (
    (
        b"version https://git-lfs",
        "it is a pointer of Git LFS, not the file itself: run `git lfs pull` where it comes from",
    ),
    (b"<", "it is a web page: fetch the file itself"),
    (b"\x89HDF", "it is HDF5, as Keras writes it, and is not read"),
)


def _why_unread(path: Path, error: Exception) -> str:
    """In our words: what libraries say of a damaged file is about their own inside, or advises to run what is in it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
    except OSError:
        start = b""
    if not start:
        return "it is empty"
    named = next((words for begin, words in _NO_WEIGHTS if start.startswith(begin)), None)
    return (
        named or f"no whole {path.suffix or 'file'} file, or one that holds more than tensors; fetch or save it again"
    )


_HOLDERS = (  # keys that hold the state dict, the first one there is taken; averaged weights only where there are no others
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params",
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher",
)  # fmt: skip


def _recognise(content: dict[str, Any], path: Path) -> _Found:
    if isinstance(content.get("feature_extractor"), dict):
        return _released(content)
    for wrapper in _HOLDERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    state = _plain({key: value for key, value in content.items() if isinstance(value, Tensor)})
    if any(
        key.startswith("model.feature_extractor.") for key in state
    ):  # the net of a training checkpoint, next to optimiser and bank
        state = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    if any(key.startswith("feature_extractor.") for key in state):
        return _Found("weights of spcl_fast", state)
    body, rest = _without_prefix(state, path)
    for recognise in (_torchvision_resnet, _torchvision_vgg16, _lite):
        found = recognise(body)
        if found is not None:
            return dataclasses.replace(found, unused=tuple(sorted({*found.unused, *rest})))
    some = ", ".join(str(key)[:60] for key in list(content)[:3]) or "nothing"
    raise CheckpointError(f"{path} is in no format we know: its keys are {some} ... We read {READABLE}.")


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _plain(state: State) -> State:
    """Without the "module." and "_orig_mod." of wrappers, wherever in a key, and without counters, which nothing here reads."""
    named = {_bare(key): value for key, value in state.items()}
    state = named if len(named) == len(state) else state
    return {key: value for key, value in state.items() if not key.endswith(("num_batches_tracked", "n_averaged"))}


_FIRST_KEYS = (  # two keys that a body has: what stands before both is the name that a program gave it
    ("conv1.weight", "layer1.0.conv1.weight"),
    ("features.0.weight", "features.28.weight"),
    ("_conv_stem.weight", "_conv_stem.weight"),
)


def _without_prefix(state: State, path: Path) -> tuple[State, tuple[str, ...]]:
    """The body in a larger net's state, such as "backbone.conv1.weight", under its own keys, and the keys of all else."""
    for first, second in _FIRST_KEYS:
        ends = [key.removesuffix(first) for key in state if key == first or key.endswith("." + first)]
        prefixes = [prefix for prefix in ends if prefix + second in state]
        if "Scale." in prefixes:
            raise CheckpointError(
                f"{path} holds Caffe's DeepLab weights (keys Scale.*): they want BGR images of 0-255 with a mean subtracted and the "
                "stride in a block's first convolution, and this net takes RGB and has the stride in the second. "
                "Start from torchvision's ResNet state dict."
            )
        if len(prefixes) > 1:
            raise CheckpointError(
                f"{path} holds {len(prefixes)} nets: {', '.join(prefix or '(no prefix)' for prefix in prefixes)}. "
                "Save the state dict of the one to start from."
            )
        if prefixes:
            (prefix,) = prefixes
            body = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            return body, tuple(sorted(key for key in state if not key.startswith(prefix)))
    return state, ()


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def _released(content: dict[str, Any]) -> _Found:
    parts = {
        name: _plain(content[name])
        for name in ("feature_extractor", "classifier")
        if isinstance(content.get(name), dict)
    }
    state = {key: value for name, part in parts.items() for key, value in _prefixed(name + ".", part).items()}
    return _Found("a released SPCL checkpoint", state, covers=tuple(name + "." for name in parts))


_RESNET_HEADS = ("fc.", "layer5.", "layer6.", "classifier.", "aux_classifier.")
_WITH_LAYER5 = "torchvision's ResNet state dict (heads layer5, layer6 not read; if it descends from Caffe's DeepLab it wants BGR images)"


def _torchvision_resnet(state: State) -> _Found | None:
    if "conv1.weight" not in state or "layer1.0.conv1.weight" not in state:
        return None
    # a classifier of ImageNet, or the heads of DeepLab's descendants and of torchvision's segmentation nets
    body = {key: value for key, value in state.items() if not key.startswith(_RESNET_HEADS)}
    prefix = "feature_extractor.backbone."
    name = _WITH_LAYER5 if any(key.startswith("layer5.") for key in state) else "torchvision's ResNet state dict"
    return _Found(name, _prefixed(prefix, body), tuple(sorted({*state} - {*body})), (prefix,))


def _torchvision_vgg16(state: State) -> _Found | None:
    if "features.0.weight" not in state or "features.28.weight" not in state:
        return None
    prefix = "feature_extractor.backbone."
    moved = {}
    for key, value in state.items():
        if key.startswith("features."):
            _, index, name = key.split(".")
            # This net has no pool4, which is layer 23: what comes after it moves up by one.
            moved[f"{prefix}{int(index) - (int(index) > 23)}.{name}"] = value
    unused = tuple(sorted(key for key in state if key.startswith("classifier.")))
    return _Found("torchvision's VGG16 state dict", moved, unused, (prefix,), (prefix + "29.", prefix + "31."))


def _lite(state: State) -> _Found | None:
    if "_conv_stem.weight" not in state:
        return None
    name = lite.which_lite(state) or "lite0"
    unused = {key for key in state if key.startswith(lite.TABLES[name].unused)}
    prefix = "feature_extractor.encoder."
    body = _prefixed(prefix, {key: value for key, value in state.items() if key not in unused})
    return _Found(f"the EfficientNet-{name.capitalize()} encoder", body, tuple(sorted(unused)), (prefix,))
