"""Storage: local folders and buckets, JSON and Parquet files, row stores with manifests, locks.

Begin with `paths` (the layout of all folders), `filesystem` (folders and buckets), `row_store` (parts, merge, manifest)
and `schemas` (the Arrow schema of each kind of row). Imports no other package of raykd.
"""
