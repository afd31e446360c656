"""The subcommands of `radix-ops`, one module each."""
