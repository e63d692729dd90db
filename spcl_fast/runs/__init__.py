"""The run folder: its layout, its files, how they are written so that a kill at any moment loses nothing, and how they are read."""
