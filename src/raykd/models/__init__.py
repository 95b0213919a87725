"""Models: load and identify models, tokenize, read architectures, check adapters.

Begin with `loading`; `architecture` reads a model's shape without loading it.
"""
