"""The page of `svqvae demo`: encode a photograph in the browser, compare it with its reconstructions, see the ids."""
