"""tercet: fine-tune sentence-embedding models on triplets, and publish with proof."""

__version__ = "0.1.0"
