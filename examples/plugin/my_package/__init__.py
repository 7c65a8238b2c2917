"""An objective and a family of models, each a module that an entry point names."""
