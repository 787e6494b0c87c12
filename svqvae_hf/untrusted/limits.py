MAX_LEVELS = 16  # far more than any model has: a file that claims thousands of levels or blocks would never load
MAX_BLOCKS = 64  # of a level
