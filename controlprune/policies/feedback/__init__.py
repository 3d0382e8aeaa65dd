"""The feedback policy: the blocks of the loop, wired."""
