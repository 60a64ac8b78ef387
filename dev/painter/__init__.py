"""A small model that really draws, the world that it learned from, and subjects that it has never seen."""
