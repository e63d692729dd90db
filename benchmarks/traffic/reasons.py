"""The prose of docs/gpu-evidence.md: why a goal is missed, what was mended, and how a verdict is reached."""

from __future__ import annotations

from benchmarks.tables import markdown

MISSED = """### Missed, and why

* **Features asked for more than once per pass.** With many classes (C, D) a block works on 64 to 240 of them at a time and
  asks for its pixels again for the next ones; CUDA's backward without saved logits asks a second time for the gradient's
  radial part. *again* and *in flight* show where that is served: the second goal leaves out what L2 still holds. A block
  that held all sums of D would need 64 pixels x 1900 floats, 486 KB of a multiprocessor's 228 KB.
* **Two S from DRAM where the prototypes are learned.** Their gradient is a kernel of its own. In one kernel with the
  features' gradient each block would carry K x D sums of float32: 156 KB at A, 307 KB at C, 1.9 MB at D, next to the
  pixels. At B it is 19 KB and would fit: not done.
* **CUDA's D.** 1900 classes are 8 rounds of 240 for the forward. The second and later rounds find the pixels in L2, and
  the products take longer than the reads (see the verdicts).
* **Sectors, rows aligned.** `unit_moments` of Triton at A holds 2048 channels of 4 pixels in registers: 16 bytes of a row in
  float32, 8 in half floats, of a sector of 32. The same program's next tiles read the rest, 64 KB later, from L1: *again*.
  DRAM moves it once.
* **Sectors, odd rows.** A request of 64 pixels is 8 sectors of float32 and 4 of half floats; rows that begin anywhere touch 8 7/8
  and 4 15/16: 1.11 and 1.23. Triton's float32 backward (32 pixels) and CUDA's float32 (two requests per row) have 1.23; in
  CUDA's half floats the last element of a shifted row is a request of its own (1.36), and a gradient's row is written in two
  (1.51). The sector that two requests share is in L1 or L2 when the second one asks for it: DRAM moves 1.00. Tiles of 128
  pixels would bring 1.12 in half floats, and leave shape A 115 blocks for 132 multiprocessors; 64 pixels in Triton's float32
  backward would bring 1.11, and one block per multiprocessor instead of three. CUDA's `moments` at A takes 16 or 32 pixels a
  tile, as 2048 channels of them fill shared memory: 1.45 to 1.49, the rest again from L2.
* **Up-sampled cross-entropy.** A program owns cells of the low-resolution grid and asks for the nodes around them, with a
  halo: several times the map's bytes, but the same block asks again within a few KB (*again*, *in flight*), so L1 and L2
  serve it. From DRAM come 0.06 to 0.15 U.
* **Shared wavefronts.** CUDA's D goes through the general kernels, whose writes of a round's logits and products still meet in
  banks; `moments` at A walks mixed units pixel by pixel, where lanes read words 36 or 20 apart. Not done.
* **channels_last in half floats, CUDA.** Two channels of two pixels are turned in registers, as cp.async cannot: what is on its way
  then is 32 bytes per thread and was not counted, so the verdict's share (0.44) is a lower bound.
* **Blocks and bytes in flight.** The list after the verdicts names the kernels of A and B with one block and less than 32 KB: CUDA's
  `moments` where rows of half floats are odd or channels lie side by side (through registers: cp.async copies 4 bytes at
  least), Triton's `moments` and the prototypes' gradients, which are one stage deep by their registers.
"""

# (case, backend, pass, figure of the page) -> what it was before larger blocks, saved logits and writes without bank conflicts
BEFORE = {
    ("prototype_contrastive_loss, C, float32, even", "triton", "backward", "read"): 21.0,
    ("prototype_contrastive_loss, C, float32, even, learned prototypes", "triton", "backward", "read"): 66.0,
    ("prototype_contrastive_loss, D, float32, even", "triton", "backward", "read"): 121.0,
    ("prototype_contrastive_loss, D, float32, even, learned prototypes", "triton", "backward", "read"): 421.0,
    ("prototype_contrastive_loss, B, half, even, learned prototypes", "triton", "backward", "read"): 4.0,
    ("prototype_contrastive_loss, C, half, even, learned prototypes", "triton", "backward", "read"): 26.0,
    ("prototype_contrastive_loss, D, half, even, learned prototypes", "triton", "backward", "read"): 181.0,
    ("prototype_contrastive_loss, D, half, even", "triton", "forward", "all_requested"): 30.73,
    ("prototype_contrastive_loss, C, float32, even, learned prototypes", "triton", "backward", "all_requested"): 120.6,
    ("prototype_contrastive_loss, D, float32, even, learned prototypes", "triton", "backward", "all_requested"): 805.28,
    ("prototype_contrastive_loss, D, half, even, learned prototypes", "triton", "backward", "all_requested"): 350.03,
    ("prototype_contrastive_loss, B, half, even", "cuda", "forward", "shared_writes_over_ideal"): 1.66,
    ("prototype_contrastive_loss, C, half, even", "cuda", "forward", "shared_writes_over_ideal"): 2.05,
    ("prototype_contrastive_loss, D, half, even", "cuda", "forward", "shared_writes_over_ideal"): 3.34,
    ("prototype_contrastive_loss, A, half, even", "cuda", "backward", "shared_reads_over_ideal"): 1.44,
    ("prototype_contrastive_loss, A, half, channels_last", "cuda", "forward", "shared_writes_over_ideal"): 3.35,
    ("prototype_contrastive_loss, A, half, channels_last", "cuda", "backward", "shared_writes_over_ideal"): 2.70,
    ("prototype_contrastive_loss, A, float32, channels_last", "cuda", "forward", "shared_writes_over_ideal"): 3.16,
    ("class_moments, A, half, channels_last", "cuda", "forward", "shared_writes_over_ideal"): 3.59,
    ("class_moments, A, float32, channels_last", "cuda", "forward", "shared_writes_over_ideal"): 3.47,
    ("class_moments, A, half, even", "cuda", "forward", "shared_reads_over_ideal"): 1.56,
}
FIGURES = {
    "read": "features read, S",
    "all_requested": "all bytes asked for, S",
    "shared_reads_over_ideal": "shared reads over ideal",
    "shared_writes_over_ideal": "shared writes over ideal",
}

VERDICT = """## Verdicts

**Rungs: counted and static**, put together by published rates: `benchmarks/traffic/machines.py` has them with their sources,
`verdict.py` the formula. Each resource gives a least time, in units that cancel; the largest names the limiter, and *share of
copy speed* is what has to move at the least (S forward, 2 S backward; of up-sampled ops, what they move) over the sum of the
kernels' largest. A share of 1.00 would be a copy. Not yet measured on a GPU: `make gpu` prints these next to its times and
names the rows that disagree.

| resource | least time |
|---|---|
| DRAM bytes | each sector once (a second read where the blocks in flight hold more than L2) / bandwidth |
| bytes in flight | that, times what must be on its way for copy speed (32 KB of a multiprocessor, assumed) over what is |
| waves | that, times whole waves over waves |
| L2 | sectors requested / its bandwidth |
| shared memory | wavefronts / (multiprocessors x clock); CUDA alone |
| FMA, tensor | 2 N D K x products / rate, K padded to the kernel's blocks |
| exponentials | N K per softmax / (16 x multiprocessors x clock) |
| issue slots | the hot loop's instructions x trips x warps / (4 x multiprocessors x clock); Triton alone |
"""


STATIC = """## The static side

`make kernels-check` compiles every kernel for sm_80 and sm_90 (CUDA for sm_90a and sm_100, too; Triton 3.7 compiles no tile
as small as these for sm_100) and compares each row with `benchmarks/results/kernels.json`: registers, shared memory, spills,
resident blocks, instructions by pipe of the kernel and of a trip of its hot loop. It fails with the rows that differ;
`ARGS=--update` pins them. `cuxray` 0.6.0 was tried and is not used: it reads these cubins only with NVIDIA's tools of CUDA 12.9,
which it downloads by itself, so that none of its findings could be checked by hand.
"""


def before_and_after(result: dict) -> str:
    rows = {(row["case"], row["by"]): row for row in result["rows"]}
    lines = []
    for (case, by, phase, figure), before in BEFORE.items():
        found = rows.get((case, by), {}).get(phase)
        if found is None:
            continue
        kernels = (
            [k[figure] for k in found["kernels"] if k.get(figure) is not None and k["read"]]
            if figure not in found
            else []
        )
        now = found.get(figure, max(kernels, default=float("nan")))
        lines.append([case, by, phase, FIGURES[figure], f"{before:.2f}", f"{now:.2f}"])
    return (
        "### Before and after\n\n"
        + markdown(["case", "by", "pass", "figure", "before", "now"], lines, numbers=False)
        + "\n"
    )
