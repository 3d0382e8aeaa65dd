"""The tape: axes of index spaces and what one traced forward pass says of them."""
