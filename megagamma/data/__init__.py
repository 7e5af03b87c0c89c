"""Text to training batches.

`corpus` and `readers` give documents, `tokenizer` their tokens, `parts` encodes them in parallel, `indexing`
joins the parts into token files, `prepare` does all of it, and `batches` reads the token files for training.
Only `batches` imports torch and megatron, so preparing text needs neither.
"""
