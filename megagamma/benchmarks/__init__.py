"""Measurements of speed against what a user would pick instead."""
