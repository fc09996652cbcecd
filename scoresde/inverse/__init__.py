"""Inverse problems: models of the examples that agree with an observation."""
