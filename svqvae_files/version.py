"""Version of the code that runs. The metadata of an installed package may be of another one, as with `PYTHONPATH`."""

__version__ = "0.1.0"
