"""Configuration: the experiment's YAML file as pydantic models.

Begin with `experiment` (the tree, arms and checks across sections), then `sections` and `training` (each field with its
default).
"""
