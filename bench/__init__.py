"""Every number that the README states, and the client that measures it."""
