"""Benches: methods, seeds, orders of tasks and models from one recipe, tuned alike, tested once and compared."""
