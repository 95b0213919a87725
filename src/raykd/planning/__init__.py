"""Planning: `raykd plan` and `raykd prompts`: memory, resource demand, fit, suggestions and cost.

Begin with `fit` (does each stage fit the cluster) and `memory` (bytes of an engine or a training worker).
"""
