"""Language models over the ids of a tokenizer, as models of transformers."""
