"""Checkpoints of other programs, read as models of this one. Nothing in them is executed."""
