"""The demo: a small world, conflicting preference tasks from it, and the show they are part of."""
