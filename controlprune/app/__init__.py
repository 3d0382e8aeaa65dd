"""What people see: the command line, the demo, pictures and reports. The loop never needs any of it."""
