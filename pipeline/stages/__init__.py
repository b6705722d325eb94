"""The stages of a run, one module each: it reads artifacts, calls a package and writes one."""
