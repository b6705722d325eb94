"""Development tools, outside of the wheel."""
