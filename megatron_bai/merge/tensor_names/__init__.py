"""Tell what a saved tensor's name means: canonical names, renamed views, vocabulary, parameter groups."""
