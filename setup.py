from setuptools import setup

setup(
    packages=["spcl_fast"] + [f"spcl_fast.{p}" for p in ("ops", "backends", "compat", "models", "data", "train", "report", "kernels")],
    package_dir={"spcl_fast": "spcl_fast", "spcl_fast.kernels": "kernels"},
    package_data={"spcl_fast": ["presets/*.yaml", "presets/sets/*.yaml"], "spcl_fast.report": ["*.html"]},
)
