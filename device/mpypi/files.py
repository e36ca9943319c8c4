"""Names, digests and pieces of files."""
