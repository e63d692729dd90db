"""SPCL as stages: what each one reads, trains and writes."""

from .. import config as config  # before any stage: a stage may declare its settings in its own file
