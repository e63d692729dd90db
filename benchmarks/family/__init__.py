"""Each loss of the family next to its authors' own code: `python -m benchmarks.family --authors FOLDER`."""
