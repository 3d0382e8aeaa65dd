"""Studies of the package: the bench (`python -m analysis`), and what the closed loop and the clock do."""
