"""Measurements: ours and others in the same run on the same data, as ratios.

`python -m bench SCENARIO [--quick] --json FILE`. Servers are this machine's own, started for the run.
"""
