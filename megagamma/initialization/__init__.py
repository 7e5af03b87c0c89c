"""The method: how large weights are drawn, from which numbers, and what was drawn. Plain torch and numpy."""
