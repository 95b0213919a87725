"""Cluster: connect to Ray, compute resources and placement, ask the autoscaler, clean up.

Begin with `connection` (join or start a cluster) and `resources` (placement bundles of engines and trials).
"""
