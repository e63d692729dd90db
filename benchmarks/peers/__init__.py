"""What our ops and our training step are compared with, written anew from their sources."""
