"""One case through every backend and formula: rows for the result file, in units of the features' (or the up-sampled map's) bytes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch import Tensor

from benchmarks import GPU_BACKENDS
from spcl_fast.backends import cuda

from . import cuda_launches, eager, ledger, triton_launches
from .cases import PEERS, Case, prepared

ARCH = "sm_90"
FOLDERS = {
    "upsampled_cross_entropy": ("upsampled_cross_entropy", "upsampled_prediction")
}  # of csrc/cuda that an op needs

# no case has float16 on CUDA: its kernels, a third of what there is to compile, are left out; FLOAT32_LEFT_OUT is for a case of bfloat16
FLOAT16_LEFT_OUT = (("launch.h", "default: return call(__half{});", "default: return call(__nv_bfloat16{});"),)
FLOAT32_LEFT_OUT = (("launch.h", "case kFloat32: return call(float{});", ""),)

# class_moments on as few pixels as are counted here would leave its blocks too few ranges and form the norms in a pass of their own: it is
# counted in the form that the quoted shapes take (tests/kernels/test_cuda_index.py asks their plans)
AS_QUOTED = {
    "class_moments": (
        ("class_moments.h", "kEnoughRanges =\n    64;", "kEnoughRanges =\n    1;"),
        ("class_moments.h", "pixels / (4 * num_classes)", "4"),
    )
}


def counted(case: Case, names: tuple[str, ...] = GPU_BACKENDS) -> Iterator[dict]:
    for name in names:
        if name == "cuda" and case.op not in cuda.OPTIONS:
            continue
        yield ours(case, name)
    for name in PEERS[case.op]:
        yield peer(case, name)


def ours(case: Case, name: str, replace: tuple[tuple[str, str, str], ...] = ()) -> dict:
    """replace: (file of csrc/cuda, old, new) plants a bug."""
    run = prepared(case, name)
    with _counting(case, name, replace) as forward:
        value = run.forward()
    with _counting(case, name, replace) as backward:
        gradients = run.backward(value)
    row = {"case": case.name, "by": name, "forward": _phase(forward, run.source, None, run.unit_bytes)}
    if run.wanted:
        row["backward"] = _phase(backward, run.source, gradients[0], run.unit_bytes)
    return row


@contextlib.contextmanager
def _counting(case: Case, name: str, replace) -> Iterator[list[ledger.Launch]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy, in the interpreter
        if name == "triton":
            with triton_launches.counted(ARCH) as launches:
                yield launches
        else:
            folders = FOLDERS.get(case.op, (case.op,))
            replace = (*FLOAT16_LEFT_OUT, *AS_QUOTED.get(case.op, ()), *replace)
            with cuda_launches.counted(cuda_launches.backend(*folders, replace=replace)) as launches:
                yield launches


def _phase(launches: list[ledger.Launch], source: Tensor, gradient: Tensor | None, unit: int) -> dict:
    """Figures in units; `kernels` in order of launch."""

    def share(bytes_: int) -> float:
        return round(bytes_ / unit, 3)

    features, mine = ledger.all_moved(launches, source), ledger.all_moved(launches, gradient)
    everything = ledger.total(launches)
    return {
        "read": share(features.read),
        "read_sectors": share(features.read_sectors),
        "compulsory": share(features.compulsory),
        "again_in_block": share(features.again_in_block),
        "gradient_written": share(mine.written),
        "gradient_sectors": share(mine.written_sectors),
        "all_requested": share(everything.read + everything.written),
        "all_sectors": share(everything.read_sectors + everything.written_sectors),
        "kernels": [_kernel(launch, source, gradient, unit) for launch in launches],
    }


def _kernel(launch: ledger.Launch, source: Tensor, gradient: Tensor | None, unit: int) -> dict:
    def share(bytes_: int) -> float:
        return round(bytes_ / unit, 4)

    features, mine, everything = ledger.moved(launch, source), ledger.moved(launch, gradient), ledger.total([launch])
    row = {
        "name": launch.kernel,
        "blocks": launch.blocks,
        "read": share(features.read),
        "compulsory": share(features.compulsory),
        "again": share(features.again_in_block),
        "gradient": share(mine.written),
        "all": share(everything.read + everything.written),
        "all_sectors": share(everything.read_sectors + everything.written_sectors),
        "distinct": share(ledger.distinct(launch)),
        "block_footprint_bytes": launch.footprint,
        "common_bytes": ledger.common(launch),
    }
    if launch.threads is not None:
        assert launch.shared_read is not None and launch.shared_written is not None
        wavefronts = launch.shared_read.counted + launch.shared_written.counted
        row |= {
            "threads": launch.threads, "shared_bytes": launch.shared_bytes, "barriers_per_block": round(launch.barriers / launch.blocks, 1),
            "shared_reads_over_ideal": _over_ideal(launch.shared_read), "shared_writes_over_ideal": _over_ideal(launch.shared_written),
            "wavefronts_per_block": round(wavefronts / launch.blocks, 1), "in_flight_bytes": launch.in_flight,
        }  # fmt: skip
    return row


def _over_ideal(wavefronts: ledger.Wavefronts) -> float | None:
    return round(wavefronts.counted / wavefronts.ideal, 3) if wavefronts.ideal else None


def peer(case: Case, name: str) -> dict:
    run = prepared(case, name)
    with eager.counted() as forward:
        value = run.forward()
    with eager.counted() as backward:
        run.backward(value)
    row = {"case": case.name, "by": name}
    for phase, total in (("forward", forward), ("backward", backward)):
        if phase == "forward" or run.wanted:
            row[phase] = {"all_requested": round(total.bytes / run.unit_bytes, 3), "operations": total.operations}
    return row
