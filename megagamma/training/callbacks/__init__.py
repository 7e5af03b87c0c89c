"""What is done around the steps of a run. The loop knows when, a callback knows what.

`standard_callbacks` lists those of every run; `base.Callback` is the seam for more.
"""
