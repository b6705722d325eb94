"""Phones over ADB, and this host, as things that measure a model."""
