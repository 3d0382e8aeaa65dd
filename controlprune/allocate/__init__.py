"""Values and costs -> masks: pure functions of arrays."""
