"""Families of models, a module each: all that the library knows of one kind of architecture (docs/families.md)."""
