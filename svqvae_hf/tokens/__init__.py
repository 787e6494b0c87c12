"""Token files, and one image to its tokens and back."""
