"""What every process of Baton agrees on: messages, errors, configuration, metrics. Never imports torch."""
