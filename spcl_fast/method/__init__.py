"""SPCL as stages: what each one reads, trains and writes."""
