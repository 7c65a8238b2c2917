"""Routes on disk: the compact code, the files, and the statistics that `inspect` prints."""
