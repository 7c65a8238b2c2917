"""The samples of a run that are kept to be read: which, their files, and their text."""
