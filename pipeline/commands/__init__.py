"""The subcommands of `nelf`."""
