"""megagamma: pretraining of large language models with the scale of initialization as a first-class option."""

__version__ = "0.1.0"
