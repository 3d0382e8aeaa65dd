"""Plans, estimates and totals over the run: pure functions of numbers, each with its state threaded."""
