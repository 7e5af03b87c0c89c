"""What people see of runs: console lines, tables, plots."""
