"""The method's mathematics: no state, no files, no host."""
