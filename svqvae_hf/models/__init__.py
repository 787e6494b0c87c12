"""The model and its image processor. Nothing here knows token files, data sets or pipelines."""
