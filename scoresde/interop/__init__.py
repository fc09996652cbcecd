"""Import of checkpoints from other programs, without executing any code in them."""
