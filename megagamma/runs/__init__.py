"""The folder of a run: every file name in it, who writes and reads it, and runs side by side."""
