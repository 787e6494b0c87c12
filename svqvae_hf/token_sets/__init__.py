"""Token sets: image sets as ids, in Parquet files that `datasets` reads."""
