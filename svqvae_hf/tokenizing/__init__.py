"""Makes token sets from image sets."""
