"""A page about runs that a person wants to open: one HTML file, without a network."""
