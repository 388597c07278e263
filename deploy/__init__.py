"""Running Baton: the one-machine launcher and the terminal's commands."""
