"""Does it adapt? Settings x seeds x pairs of domains, one JSON line each: python -m benchmarks.adaptation run PLAN.yaml"""
