"""The `radix-ops` command: what each subcommand does. Its arguments stand in `radix_ops_command`."""

from radix_ops_command import main

__all__ = ["main"]
