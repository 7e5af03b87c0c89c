"""To Hugging Face folders and back, with proof."""
