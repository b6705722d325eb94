"""Template files of a generated Lens Studio project; read with importlib.resources."""
