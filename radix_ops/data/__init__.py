"""Files of the command: what is read from them and written to them."""
