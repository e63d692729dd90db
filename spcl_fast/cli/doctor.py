"""What `spcl-fast doctor` says: versions, devices, every backend of every op with its reason, and a self-test of those that are usable.

Needs nothing but torch: it is run when something else does not work.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from .. import __version__, catalog, ops
from ..backends import available_backends, origin_of_choice, taken
from ..backends.built import BUILT, build_record

_LIBRARIES = {  # name on the index -> extra that brings it
    "numpy": "", "triton": "", "PyYAML": "train", "rich": "train", "pillow": "train", "safetensors": "train",
    "matplotlib": "train", "jinja2": "train",
    **{row.library: row.library for row in catalog.NETS if row.library},
}  # fmt: skip
# Largest error of a float32 backend against float64, relative to the largest value. Far above rounding, far below any real fault.
TOLERANCE = 1e-4


def examine(say: Callable[[str], None] = print) -> int:
    """Print everything; 0 if all that should work does, else 1."""
    broken: list[str] = []
    say(f"spcl_fast {__version__}, Python {platform.python_version()}, {platform.platform()}")
    say(f"torch {torch.__version__}")
    _libraries(say)
    _torchvision(say)
    _devices(say)
    broken += _compiled_part(say) + _cuda_part(say)
    broken += _catalog(say)
    for device in _usable_devices():
        broken += _backends(device, say)
    say("")
    for line in broken:
        say(f"BROKEN {line}")
    say("Something is broken; see above." if broken else "Everything that is there works.")
    return 1 if broken else 0


def _libraries(say: Callable[[str], None]) -> None:
    found, missing = [], []
    for name, extra in _LIBRARIES.items():
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            use = "training and data" if extra == "train" else f"model.name {extra}/NAME"
            missing.append(name if not extra else f'{name} (for {use}: pip install "spcl_fast[{extra}]")')
    say(", ".join(found))
    for name in missing:
        say(f"missing: {name}")


def _torchvision(say: Callable[[str], None]) -> None:
    """A torchvision built for another torch breaks the libraries that import it. We do not; users should know."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return
    try:
        importlib.import_module("torchvision")
        say(f"torchvision {version} (not used here)")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(
            f"WARNING torchvision {version} is installed and does not import with torch {torch.__version__}: {reason}. spcl_fast does not "
            "use it, but torchmetrics, transformers and timm fail with it. Uninstall it, or install the one made for this torch."
        )


def _catalog(say: Callable[[str], None]) -> list[str]:
    """What can be named in settings, each looked up where the catalog says it is; returns what is not there."""
    broken = []
    tables = {"nets": catalog.NETS, "losses": catalog.LOSSES, "data sets": catalog.DATA_SETS, "stages": catalog.STAGES}
    for what, table in tables.items():
        found = []
        for row in table:
            try:
                catalog.load(row.home)
                library = getattr(row, "library", "")
                lacking = library and importlib.util.find_spec(library) is None
                found.append(f"{row.name} (needs {library})" if lacking else row.name)
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("spcl_fast"):
                    broken.append(f"{row.name} of the catalog: {error}")
                else:
                    found.append(f"{row.name} (needs {error.name})")
            except Exception as error:
                broken.append(f"{row.name} of the catalog: {type(error).__name__}: {error}")
        say(f"{what}: {', '.join(found)}")
    return broken


def _usable_devices() -> list[torch.device]:
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def _devices(say: Callable[[str], None]) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    say(f"device cpu: {os.cpu_count()} logical CPUs, {torch.get_num_threads()} threads, {capability}")
    for index in range(torch.cuda.device_count()):
        about, cuda = torch.cuda.get_device_properties(index), torch.version.cuda
        say(
            f"device cuda:{index}: {about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.1f} GiB, CUDA {cuda}"
        )
    if not torch.cuda.is_available():
        say("device cuda: none" + ("" if torch.version.cuda else " (this torch is built for the CPU alone)"))


def _compiled_part(say: Callable[[str], None]) -> list[str]:
    """A cpu backend that was never built means a slower machine; one that was built and does not load, a broken one."""
    try:
        compiled = importlib.import_module("spcl_fast._cpu")
    except ImportError as error:
        reason = build_record("cpu")
        if reason == BUILT:
            say(f"cpu backend: built, and does not load: {error}")
            return [
                f"the cpu backend was built and does not load with torch {torch.__version__}; build it again: {error}"
            ]
        say(f"cpu backend: not there: {reason}. The reference backend does its work, slower.")
        return []
    info = compiled.build_info()
    words = "; ".join(f"{key} {_joined(value)}" for key, value in info.items())
    say(f"cpu backend: runs as {compiled.cpu_capability()}; built with {words}")
    return []


def _cuda_part(say: Callable[[str], None]) -> list[str]:
    """The same of the CUDA kernels: never built is Triton's work, built and not loading is broken."""
    reason = build_record("cuda")
    if reason != BUILT:
        say(f"CUDA part: not there: {reason}. On a GPU the Triton backend does its work.")
        return []
    try:
        module = importlib.import_module("spcl_fast._cuda")
    except Exception as error:
        say(f"CUDA part: built, and does not load: {error}. The Triton backend does its work.")
        needs = (
            "it needs a CUDA build of torch (libtorch_cuda.so), 2.11 or newer; with that one installed, build it again"
        )
        return [f"the CUDA part was built and does not load with torch {torch.__version__}: {error}; {needs}"]
    say(f"CUDA part: built with nvcc {module.toolkit} for {module.archs}")
    return []


def _joined(value: object) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)


def _backends(device: torch.device, say: Callable[[str], None]) -> list[str]:
    """One line per op and backend; returns what failed its self-test."""
    broken = []
    say(f"\nbackends on {device}")
    for op, backends in available_backends(device).items():
        first = os.environ.get("SPCL_FAST_BACKEND") or taken(op, device)
        for backend, reason in backends.items():
            name = f"  {op:<31} {backend + (' *' if backend == first else ''):<12}"
            if reason is not None:
                say(f"{name} not usable: {reason}")
                continue
            error, problem = self_test(op, backend, device)
            said = "usable, self-test passed" if problem is None else f"FAILED: {problem}"
            say(f"{name} {said} (error against float64 {error:.0e})")
            if problem is not None:
                broken.append(f"{op} on backend {backend}, {device}: {problem}")
        if choice := origin_of_choice(op, device):
            say(f"  {op:<31} choice: {choice}")
    large = " (where the size decides: for large float32 problems with 19 classes)" if device.type == "cuda" else ""
    say(
        "  * is taken where none is asked for by name"
        + (" (SPCL_FAST_BACKEND)" if "SPCL_FAST_BACKEND" in os.environ else large)
    )
    return broken


# ---------------------------------------------------------------------------------------------- self-test


def self_test(op: str, backend: str, device: torch.device) -> tuple[float, str | None]:
    """(largest relative error against float64, what is wrong or None) of a small, ragged problem, values and gradients."""
    try:
        got = _PROBLEMS[op](backend, device, torch.float32)
        truth = _PROBLEMS[op]("reference", torch.device("cpu"), torch.float64)
    except Exception as error:
        return float("nan"), f"{type(error).__name__}: {error}"
    worst = 0.0
    for value, exact in zip(got, truth, strict=True):
        value, exact = value.detach().cpu().double(), exact.detach().double()
        if not value.isfinite().all():
            return float("inf"), "values that are not finite"
        worst = max(worst, float((value - exact).abs().max() / exact.abs().max().clamp_min(1e-30)))
    return worst, None if worst <= TOLERANCE else f"error {worst:.1e} against float64, expected at most {TOLERANCE:.0e}"


def _inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(2, 24, 9, 11, generator=generator).to(device, dtype)
    labels = torch.randint(0, 7, (2, 19, 23), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    prototypes = torch.randn(7, 24, generator=generator).to(device, dtype)
    return features, labels.to(device), prototypes


def _contrast(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    features, labels, prototypes = _inputs(device, dtype)
    features.requires_grad_()
    prototypes.requires_grad_()
    loss = ops.prototype_contrastive_loss(features, labels, prototypes, temperature=0.5, backend=backend)
    return (loss, *torch.autograd.grad(loss, (features, prototypes)))


def _moments(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    features, labels, _ = _inputs(device, dtype)
    moments = ops.class_moments(features, labels, 7, backend=backend)
    return moments.sums, moments.counts


def _cross_entropy(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    features, labels, _ = _inputs(device, dtype)
    logits = features[:, :7].detach().requires_grad_()
    loss = ops.upsampled_cross_entropy(logits, labels, temperature=1.8, backend=backend)
    return (loss, *torch.autograd.grad(loss, logits))


def _prediction(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    features, labels, _ = _inputs(device, dtype)
    prediction = ops.upsampled_prediction(features[:, :7], (labels.shape[1], labels.shape[2]), backend=backend)
    return prediction.labels, prediction.confidence


def _logits(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    features, _, prototypes = _inputs(device, dtype)
    features.requires_grad_()
    prototypes.requires_grad_()
    logits = ops.prototype_logits(features, prototypes, temperature=0.5, backend=backend)
    return (logits, *torch.autograd.grad(logits.square().sum(), (features, prototypes)))


def _confusion(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    features, labels, _ = _inputs(device, dtype)
    return (ops.upsampled_confusion(features[:, :7], labels, backend=backend),)


def _binary_cross_entropy(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    features, labels, _ = _inputs(device, dtype)
    logits = features[:, :7].detach().requires_grad_()
    loss = ops.upsampled_binary_cross_entropy(logits, labels, backend=backend)
    return (loss, *torch.autograd.grad(loss, logits))


def _balance(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    features, _, prototypes = _inputs(device, dtype)
    return ops.balance_(features[:, :, 0].permute(0, 2, 1).flatten(0, 1), prototypes, temperature=5.0, backend=backend)


_PROBLEMS: dict[str, Callable[[str, torch.device, torch.dtype], tuple[Tensor, ...]]] = {
    "prototype_contrastive_loss": _contrast,
    "class_moments": _moments,
    "upsampled_cross_entropy": _cross_entropy,
    "upsampled_prediction": _prediction,
    "prototype_logits": _logits,
    "upsampled_confusion": _confusion,
    "upsampled_binary_cross_entropy": _binary_cross_entropy,
    "balance_": _balance,
}
