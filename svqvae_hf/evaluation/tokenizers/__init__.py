"""One protocol for all tokenizers: adapters of the classes of other libraries, and the loop that measures them."""
