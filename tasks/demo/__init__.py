"""Data of the demo task: ten kinds of clothing (`task.yaml` and one parquet file a split; see `README.md`)."""
