"""The runner program for phones, and its build."""
