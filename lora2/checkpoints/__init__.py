"""Training states: writing, finding, checking, restoring."""
