"""The KV blocks' way from one worker to another."""
