"""The commands, one module each with `main(arguments) -> exit code`; `megagamma --help` lists them.

A module's docstring is its help, and the first line of it stands in the list.
"""
