"""What each stage does: thin functions that read files, call one room and write files."""
