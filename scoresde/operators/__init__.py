"""Operators that measure examples, and observations made with them."""
