"""Text to token files.

`corpus` and `readers` give documents, `parts` encodes them in parallel, `indexing` joins the parts into token files,
and `prepare` does all of it. Nothing here imports torch or Megatron.
"""
