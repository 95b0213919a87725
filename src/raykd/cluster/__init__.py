"""Cluster: connection to Ray, resources and placement, autoscaler requests, clean-up.

Begin with `connection` (join or start a cluster) and `resources` (placement bundles of engines and trials).
"""
