"""What every process of Baton agrees on: messages, errors, configuration. Never imports torch."""
