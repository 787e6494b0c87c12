"""Local paths, folders on a disk or in an object store, and files that are either complete or absent."""
