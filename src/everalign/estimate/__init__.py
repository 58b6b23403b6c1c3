"""What a run will take, before it is started: steps, hours, memory, disk and cost, beside the alternatives.

See docs/estimate.md for the formulas, their sources and what they assume.
"""
