"""Report: results read from an experiment's folder, as tables, figures, HTML, Markdown and CSV.

Begin with `results` (what is read) and `build` (what is written).
"""
