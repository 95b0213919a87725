"""Configuration: the experiment's YAML file as pydantic models, and the record of a run for its readers.

Begin with `experiment` (the tree, arms and checks across sections), then `sections` and `training` (each field with its
default). `run_record` reads the record.
"""
