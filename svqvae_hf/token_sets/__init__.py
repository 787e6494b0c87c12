"""Image sets as token sets: ids in Parquet files that `datasets` reads."""
