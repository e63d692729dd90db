"""Peak memory of a stage, predicted without a GPU, and settings that fit."""
