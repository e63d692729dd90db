"""Builds spcl_fast._C where torch and a compiler are found. Where not, the install is pure Python and says why.

The kernels of csrc/cpu are compiled once per instruction set; which one runs is decided on the machine that runs them.
"""

import importlib.util
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as PlainBuild

ROOT = Path(__file__).parent
REASON_FILE = "native_build.txt"  # beside _C: "built", or why it was not
# No -ffast-math: NaN and infinity must come through. -ffp-contract=fast lets a * b + c be one instruction.
KERNEL_FLAGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-maybe-uninitialized",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
X86_LEVELS = {"avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]}
OPS = ("prototype_contrastive_loss", "class_moments", "upsampled_cross_entropy", "upsampled_prediction")
KERNELS = [f"csrc/cpu/{op}.cpp" for op in OPS]
MODULE = [f"csrc/ops/{part}.cpp" for part in (*OPS, "levels", "pages", "module")]


def levels() -> dict[str, list[str]]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {"baseline": [], **(X86_LEVELS if x86 else {})}


def torch_build() -> tuple[type, str | None]:
    """The build command of torch and None, or the plain one and why torch's cannot be used."""
    if os.environ.get("SPCL_FAST_NO_NATIVE"):
        return PlainBuild, "SPCL_FAST_NO_NATIVE was set when the package was built"
    if sys.platform == "win32":
        return PlainBuild, "the C++ kernels are built on Linux and macOS only"
    if importlib.util.find_spec("torch") is None:
        return PlainBuild, "torch was not importable when the package was built; build again with `pip install --no-build-isolation .`"
    try:
        from torch.utils.cpp_extension import BuildExtension
    except Exception as error:  # a torch that is there but broken must not break the install
        return PlainBuild, f"torch did not import when the package was built: {error}"
    return BuildExtension, None


BASE, NO_TORCH = torch_build()


class BuildNative(BASE):
    """Compiles the kernels level by level, then the module; a failure becomes a sentence in REASON_FILE, not a failed install."""

    def run(self):
        reason, in_place = NO_TORCH, self.inplace
        if reason is None:
            try:
                super().run()
            except BaseException as error:  # torch raises RuntimeError, distutils SystemExit
                if isinstance(error, KeyboardInterrupt):
                    raise
                reason = f"the C++ build failed: {str(error).strip() or type(error).__name__}"
                self.inplace = in_place  # setuptools turns it off while it builds
        self.record(reason)

    def build_extension(self, ext):
        for level, flags in levels().items():
            folder = Path(self.build_temp) / level
            ext.extra_objects += self.compiler.compile(
                KERNELS, output_dir=str(folder), macros=[("SPCL_ISA", level)], extra_postargs=[*KERNEL_FLAGS, *flags], depends=ext.depends
            )
        super().build_extension(ext)

    def record(self, reason):
        folders = {Path(self.get_ext_fullpath("spcl_fast._C")).parent, *([ROOT / "spcl_fast"] if self.inplace else [])}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REASON_FILE).write_text((reason or "built") + "\n")
        if reason is not None:
            for stale in (s for folder in folders for s in folder.glob("_C.*")):
                stale.unlink()
            print(f"spcl_fast: no native kernels: {reason}", file=sys.stderr)


def native_extension() -> Extension:
    flags = ["-std=c++20", "-O2", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    if len(levels()) > 1:
        flags.append("-DSPCL_HAS_X86_LEVELS")
    if NO_TORCH is not None:
        return Extension("spcl_fast._C", MODULE, optional=True)
    from torch.utils.cpp_extension import CppExtension, library_paths

    try:
        import pybind11

        include = [pybind11.get_include()]
    except ImportError:
        include = []  # torch ships a copy of the headers
    said = " ".join(KERNEL_FLAGS + [f"[{level}: {' '.join(extra)}]" for level, extra in levels().items() if extra])
    libraries = [f"-Wl,-rpath,{origin}" for origin in ("$ORIGIN/../torch/lib", *library_paths())] if sys.platform == "linux" else []
    return CppExtension(
        "spcl_fast._C",
        MODULE,
        include_dirs=[str(ROOT / "csrc"), *include],
        depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()),
        extra_link_args=libraries,  # so that _C imports before torch does
        extra_compile_args=[*flags, f'-DSPCL_CXX_FLAGS="{said}"'],
        optional=True,
    )


setup(
    packages=["spcl_fast"] + [f"spcl_fast.{p}" for p in ("ops", "backends", "compat", "models", "data", "train", "report", "kernels")],
    package_dir={"spcl_fast": "spcl_fast", "spcl_fast.kernels": "kernels"},
    package_data={"spcl_fast": ["presets/*.yaml"], "spcl_fast.report": ["*.html"]},
    ext_modules=[native_extension()],
    cmdclass={"build_ext": BuildNative},
)
