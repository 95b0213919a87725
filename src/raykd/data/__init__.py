"""Data: datasets and their splits, prompts and evaluation protocols, answer extraction and grading.

Begin with `datasets` (load and split problems), then `prompts` (messages to teacher and student) and `grading`.
"""
