"""Runs that outlive their processes: a supervisor that restarts them, SLURM, and what jobs need of a site.

Standard library only below the config, so that a batch script's process starts at once and never holds a GPU.
"""
