"""How a model develops: numbers of whole logical matrices, the same from a live run, a checkpoint and an exported folder."""
