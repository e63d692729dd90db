"""Training: the loop, the stages on top of it, and everything that touches clocks, files and optimisers."""
