"""What the GPU kernels move, counted on a CPU from their own source: Triton's in its interpreter, CUDA's in the tests' emulator."""
