"""Demonstration: how the built-in teacher and student were made.

Begin with `README.md` (what the models do) and `train` (how they were trained). No other package imports this one.
"""
