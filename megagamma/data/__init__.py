"""Text to training batches: `corpus` -> `tokenizer` -> `indexing`, put together by `prepare`; `batches`
reads them back.

Only `batches` imports torch and megatron, so preparing text needs neither.
"""
