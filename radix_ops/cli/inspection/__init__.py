"""What `radix-ops inspect` prints and draws."""
