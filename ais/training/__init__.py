"""Heads fitted to ratings: splits, the Ray Train loop, and the bundle it ends in."""
