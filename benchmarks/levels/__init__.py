"""The C++ kernels of one instruction set without torch: instructions counted, and the baseline on another processor under emulation."""
