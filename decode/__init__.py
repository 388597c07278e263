"""The decode worker: promises landings, takes KV in, writes answers one step at a time."""
