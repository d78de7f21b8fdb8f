"""Shard datasets: Parquet files of HR and LR pictures, planned and built from photographs."""
