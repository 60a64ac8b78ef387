"""Experiments that show what the method does; docs/evidence/ holds their results. See experiment.py."""
