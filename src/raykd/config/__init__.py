"""Configuration: the experiment's YAML file as pydantic models.

Begin with `experiment` (the tree, arms, and what cannot be combined), then `sections` (each field with its default).
"""
