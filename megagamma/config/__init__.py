"""What a run is: the schema of its options, the rules between them, and how they are read and resolved.

`schema` needs the standard library only, so that the method can be used without a parser.
"""
