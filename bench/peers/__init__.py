"""Other engines on this machine, each in a process and a Python of its own, behind one protocol."""
