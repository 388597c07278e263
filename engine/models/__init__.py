"""The decoder and how a checkpoint becomes one."""
