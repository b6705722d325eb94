"""The files that a generated Lens Studio project starts from; read with importlib.resources."""
