"""Keep routes on disk: the compact code, the files, and what `inspect` says of them."""
