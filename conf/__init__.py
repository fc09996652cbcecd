"""Hydra configuration; in the wheel this folder is the package scoresde.conf."""
