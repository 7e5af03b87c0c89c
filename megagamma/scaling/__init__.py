"""Studies: sweeps over sizes, gammas and seeds, planned, run, and collected into one table."""
