"""The report and the picture of `radix-ops inspect`."""
