"""One training run: plan, run, finish."""
