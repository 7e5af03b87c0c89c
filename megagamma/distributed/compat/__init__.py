"""Private names of libraries, one module a library, so that an upgrade breaks here and nowhere else.

`tests/distributed/test_compat.py` says of each name what it needs.
"""
