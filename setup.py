"""Builds spcl_fast._cpu where torch and a compiler are found, and spcl_fast._cuda where nvcc and a CUDA build of torch are, too.

Where not, the install goes on without them and says why. The kernels of csrc/cpu are compiled once per instruction set; which one runs is
decided on the machine that runs them. Those of csrc/cuda are compiled for the GPU that is there, or, without one, for every architecture
of CUDA_ARCHS.
"""

import concurrent.futures
import functools
import importlib.util
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext as PlainBuild

ROOT = Path(__file__).parent
REASON_FILE = "cpu_build.txt"  # next to _cpu: "built", or why it was not
CUDA_REASON_FILE = "cuda_build.txt"  # the same of _cuda
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
X86_LEVELS = {
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
MODULE = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/bind_*.cpp"))
KERNELS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp") if not p.name.startswith("bind_"))

# Where no GPU is seen the kernels are compiled for each of these, and as PTX of the last for what comes later; where one is, for it alone.
# SPCL_FAST_CUDA_ARCHS="90a" decides otherwise.
CUDA_ARCHS = ("80", "86", "89", "90a", "100")
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
# The CUDA runtime is linked in: the extension does not care which one torch brought along.
CUDART = ["-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]
STABLE_ABI = ["-std=c++20", "-O2", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def levels() -> dict[str, list[str]]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {"baseline": [], **(X86_LEVELS if x86 else {})}


def torch_build() -> tuple[type, str | None]:
    """The build command of torch and None, or the plain one and why torch's cannot be used."""
    if os.environ.get("SPCL_FAST_NO_CPU"):
        return PlainBuild, "SPCL_FAST_NO_CPU was set when the package was built"
    if sys.platform == "win32":
        return PlainBuild, "the C++ kernels are built on Linux and macOS only"
    if importlib.util.find_spec("torch") is None:
        return (
            PlainBuild,
            "torch was not importable when the package was built; build again with `pip install --no-build-isolation .`",
        )
    try:
        from torch.utils.cpp_extension import BuildExtension
    except Exception as error:  # a torch that is there but broken must not break the install
        return PlainBuild, f"torch did not import when the package was built: {error}"
    return BuildExtension, None


BASE, NO_TORCH = torch_build()


class BuildKernels(BASE):
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
        if ext.name.endswith("._cuda"):
            return self.build_cuda(ext)
        try:
            self.build_cpu(ext)
        except (
            Exception
        ) as error:  # an optional extension's own kinds are swallowed on the way to `run`, and the reason with them
            raise RuntimeError(str(error)) from error

    def build_cpu(self, ext):
        for level, flags in levels().items():
            folder = Path(self.build_temp) / level
            ext.extra_objects += self.compiler.compile(
                KERNELS,
                output_dir=str(folder),
                macros=[("SPCL_ISA", level)],
                extra_postargs=[*KERNEL_FLAGS, *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)

    def build_cuda(self, ext):
        """Kernels by nvcc, glue by the C++ compiler; what fails here leaves everything else as it is."""
        try:
            ext.extra_objects += compile_cuda(Path(self.build_temp) / "cuda")
            super().build_extension(ext)
        except Exception as error:
            self.cuda_reason = f"the CUDA build failed: {' '.join(str(error).split())[-1000:] or type(error).__name__}"

    def record(self, reason):
        cuda_reason = reason or getattr(self, "cuda_reason", NO_CUDA)
        folders = {
            Path(self.get_ext_fullpath("spcl_fast._cpu")).parent,
            *([ROOT / "spcl_fast"] if self.inplace else []),
        }
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REASON_FILE).write_text((reason or "built") + "\n")
            (folder / CUDA_REASON_FILE).write_text((cuda_reason or "built") + "\n")
        for why, name, what in ((reason, "_cpu", "C++"), (cuda_reason, "_cuda", "CUDA")):
            if why is not None:
                for stale in (s for folder in folders for s in folder.glob(f"{name}.*")):
                    stale.unlink()
                print(f"spcl_fast: no {what} kernels: {why}", file=sys.stderr)


def cuda_homes() -> list[Path]:
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    return [*named, *([Path(on_path).resolve().parents[1]] if on_path else []), Path("/usr/local/cuda")]


def nvcc_path() -> str | None:
    return next(filter(None, map(shutil.which, [str(home / "bin" / "nvcc") for home in cuda_homes()])), None)


def cudart_folder() -> Path | None:
    """Where libcudart_static.a lies; nvcc may be a link or a script far from it."""
    below = ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")
    folders = (home / folder for home in cuda_homes() for folder in below)
    return next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)


def nvcc_version(nvcc: str) -> str | None:
    found = re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return found and found[1]


def why_no_cuda() -> str | None:
    """None where the CUDA kernels can be built, else the reason. A GPU is not asked for."""
    if NO_TORCH is not None:
        return NO_TORCH
    import torch

    if os.environ.get("SPCL_FAST_NO_CUDA"):
        return "SPCL_FAST_NO_CUDA was set when the package was built"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; build again next to a CUDA build of torch"
    nvcc = nvcc_path()
    if nvcc is None:
        return "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda) when the package was built"
    version = nvcc_version(nvcc)
    if version is None:
        return f"{nvcc} does not say its version"
    if int(version.split(".")[0]) > int(torch.version.cuda.split(".")[0]):
        return f"{nvcc} is of CUDA {version} and torch of CUDA {torch.version.cuda}: a driver for torch may be too old for it"
    if cudart_folder() is None:
        return f"{nvcc} is there, and libcudart_static.a is not (in lib64 of CUDA_HOME, of nvcc, of /usr/local/cuda)"
    return None


def archs_of_gpus() -> list[str]:
    """Of the GPUs that this process sees; none where there is none."""
    import torch

    if not torch.cuda.is_available():
        return []
    seen = {"".join(map(str, torch.cuda.get_device_capability(i))) for i in range(torch.cuda.device_count())}
    return [next((arch for arch in CUDA_ARCHS if arch.rstrip("a") == one), one) for one in sorted(seen, key=int)]


@functools.cache
def cuda_archs(nvcc: str) -> list[str]:
    """What is compiled for: what SPCL_FAST_CUDA_ARCHS says, else the GPUs of this machine, else CUDA_ARCHS; of these what nvcc knows."""
    named = os.environ.get("SPCL_FAST_CUDA_ARCHS", "").replace(";", " ").split()
    wanted = named or archs_of_gpus() or list(CUDA_ARCHS)
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in wanted if f"sm_{arch}" in known or f"sm_{arch.rstrip('a')}" in known]
    if not archs:
        raise RuntimeError(
            f"{nvcc} knows none of the architectures {' '.join(wanted)}; SPCL_FAST_CUDA_ARCHS may name one of {' '.join(known)}"
        )
    return archs


def compile_cuda(folder: Path) -> list[str]:
    """Every .cu of csrc/cuda to an object, several at once; RuntimeError with nvcc's words where one fails."""
    nvcc = nvcc_path()
    archs = cuda_archs(nvcc)
    folder.mkdir(parents=True, exist_ok=True)
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1].rstrip('a')},code=compute_{archs[-1].rstrip('a')}")

    sources = sorted(ROOT.glob("csrc/cuda/*/*.cu"))
    begun, finished = time.monotonic(), itertools.count(1)
    report(f"nvcc compiles {len(sources)} files for {', '.join(f'sm_{arch}' for arch in archs)}")

    def compile_one(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        done = subprocess.run(
            [nvcc, *CUDA_FLAGS, *code, "-c", str(source), "-o", str(out)], capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode:
            raise RuntimeError(done.stderr or done.stdout)
        report(f"{next(finished)} of {len(sources)}: {source.name}, {time.monotonic() - begun:.0f} s since the start")
        return str(out)

    folder = folder.resolve()
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        return list(pool.map(compile_one, sources))


def report(words: str) -> None:
    """Progress; pip shows it with -v."""
    print(f"spcl_fast: {words}", file=sys.stderr, flush=True)


def cuda_extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension, library_paths

    nvcc = nvcc_path()
    archs = cuda_archs(nvcc)
    return CppExtension(
        "spcl_fast._cuda",
        sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/**/bind*.cpp")),
        library_dirs=[str(cudart_folder())],
        libraries=["torch_cuda"],  # the current stream is its answer; torch_cpu has the rest of the stable ABI
        extra_link_args=[*CUDART, *torch_rpaths(library_paths())],
        extra_compile_args=[
            *STABLE_ABI,
            f'-DSPCL_CUDA_ARCHS="{" ".join(archs)}"',
            f'-DSPCL_CUDA_TOOLKIT="{nvcc_version(nvcc)}"',
        ],
        optional=True,
    )


def torch_rpaths(library_paths: list[str]) -> list[str]:
    """So that an extension imports before torch does. A wheel for other machines names no folder of this one."""
    known = [] if os.environ.get("SPCL_FAST_PORTABLE") else library_paths
    return [f"-Wl,-rpath,{origin}" for origin in ("$ORIGIN/../torch/lib", *known)] if sys.platform == "linux" else []


def cpu_extension() -> Extension:
    flags = list(STABLE_ABI)
    if len(levels()) > 1:
        flags.append("-DSPCL_HAS_X86_LEVELS")
    if NO_TORCH is not None:
        return Extension("spcl_fast._cpu", MODULE, optional=True)
    from torch.utils.cpp_extension import CppExtension, library_paths

    try:
        import pybind11

        include = [pybind11.get_include()]
    except ImportError:
        include = []  # torch ships a copy of the headers
    said = " ".join(KERNEL_FLAGS + [f"[{level}: {' '.join(extra)}]" for level, extra in levels().items() if extra])
    return CppExtension(
        "spcl_fast._cpu",
        MODULE,
        include_dirs=[str(ROOT / "csrc"), *include],
        depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()),
        extra_link_args=torch_rpaths(library_paths()),
        extra_compile_args=[*flags, f'-DSPCL_CXX_FLAGS="{said}"'],
        optional=True,
    )


NO_CUDA = why_no_cuda()
setup(
    packages=[
        *find_packages(include=["spcl_fast", "spcl_fast.*"]),
        "spcl_fast.kernels",
        *(f"spcl_fast.kernels.{p}" for p in find_packages("kernels")),
    ],
    package_dir={"spcl_fast": "spcl_fast", "spcl_fast.kernels": "kernels"},
    package_data={
        "spcl_fast": ["py.typed"],
        "spcl_fast.config": ["presets/*.yaml", "presets/sets/*.yaml"],
        "spcl_fast.report": ["*.html"],
        "spcl_fast.backends": ["*.json"],
    },
    ext_modules=[cpu_extension(), *([] if NO_CUDA else [cuda_extension()])],
    cmdclass={"build_ext": BuildKernels},
)
