"""Storage: local folders and buckets, JSON and Parquet files, row stores with manifests, locks.

Begin with `filesystem` (paths of folders and buckets), `row_store` (parts, merge, manifest) and `schemas` (the Arrow
schema of each kind of row). Imports nothing else of raykd.
"""
