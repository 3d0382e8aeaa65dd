"""What is saved and resumed: files that appear whole, checksums, versions."""
