"""Masks -> tensors, exactly: masked or shrunk, with parked weights and optimizer state."""
