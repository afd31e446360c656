"""The shapes of rows that data sets of the hub have, and what the tasks parse of them."""
