"""Image sets, which are read once, and token sets, which are made of them."""
