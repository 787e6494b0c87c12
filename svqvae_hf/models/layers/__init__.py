"""What the networks are made of: operations tuned for speed, and features in pieces."""
