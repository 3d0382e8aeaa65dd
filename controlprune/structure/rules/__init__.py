"""One small rule per family of operators, in one table (table.py)."""
