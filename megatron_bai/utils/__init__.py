"""Small tools that import nothing of the library."""
