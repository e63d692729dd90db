"""The shapes that every figure is quoted on."""

from __future__ import annotations

CONTRAST = {  # B, D, h, w, K
    "A": (1, 2048, 91, 161, 19),  # SPCL as released: 1280x720 at stride 8; h * w is odd, so rows are not aligned
    "B": (2, 256, 256, 512, 19),  # a projection head, 2048x1024 at stride 4
    "C": (1, 512, 512, 1024, 150),  # a large map, many classes
    "D": (8, 256, 128, 256, 1900),  # 100 prototypes per class
    "S": (1, 256, 32, 64, 19),  # launches are the cost
    "B'": (2, 256, 128, 256, 19),  # the primed ones are cut so that a CPU needs seconds
    "C'": (1, 512, 128, 256, 150),
    "E'": (2, 64, 256, 512, 19),
}
UPSAMPLED = {  # (B, K, h, w), (H, W)
    "U0": ((1, 19, 16, 32), (128, 256)),  # launches are the cost
    "U1": ((1, 19, 91, 161), (720, 1280)),  # SPCL's segmentation loss
    "U2": ((2, 19, 128, 256), (512, 1024)),  # a Cityscapes crop
    "U3": ((16, 150, 128, 128), (512, 512)),  # ADE20K
    "U3'": ((2, 150, 64, 64), (256, 256)),
}
CPU, CPU_UPSAMPLED = ("A", "B'", "C'", "E'"), ("U1", "U2", "U3'")
GPU, GPU_UPSAMPLED = ("A", "B", "C", "D", "S"), ("U1", "U2", "U3", "U0")
