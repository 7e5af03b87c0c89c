"""Pools of real ranks, and the comparison of layouts; for users' tests too."""
