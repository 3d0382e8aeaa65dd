"""What a unit is, and how a mask of units is laid down in the model: one file per kind."""
