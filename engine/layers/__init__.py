"""Parts of the decoder, each in plain torch."""
