"""Token files to training batches; `preparation` writes the token files."""
